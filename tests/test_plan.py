"""The planner: FLOPs and bytes against counts by hand, its errors, and a real compilation."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import pytest
from jax.sharding import PartitionSpec as P

from configs import lamp4, lamp5, llms
from configs import longlamp_review as longlamp
from pplug_jax.errors import ConfigError, InputError
from pplug_jax.llm import abstract_llm
from pplug_jax.llm.shapes import PUBLISHED, published_directory
from pplug_jax.methods.table import METHODS
from pplug_jax.plan import plan
from pplug_jax.plan.chips import CHIPS, Slice, find_slice
from pplug_jax.plan.flops import matmul_flops
from pplug_jax.plan.hlo import Traffic, received, traffic
from pplug_jax.plan.planner import meshes, roomy_mesh
from pplug_jax.plan.programs import Programs
from pplug_jax.plan.roofline import GIB, Cost, Memory, too_large
from pplug_jax.plan.training import TrainPlan, axes, hours
from pplug_jax.plugs.base import parameter_count
from pplug_jax.runtime.mesh import make_mesh
from pplug_jax.session import Models
from pplug_jax.session.weights import new_weights
from pplug_jax.settings import Settings
from pplug_jax.train.step import abstract_optimizer, init_optimizer, make_optimizer


def tiny_config(**settings: object) -> ml_collections.ConfigDict:
    config = lamp5.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in settings.items()})
    return config


# FLOPs.


def dense(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
    return jnp.tanh(x @ w), None


X, W = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((3, 8, 8), jnp.float32)
LAYER = 2 * 4 * 8 * 8


def test_flops_of_a_scan_are_those_of_all_its_layers() -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(dense, x, w)[0])

    def loss_remat(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(jax.checkpoint(dense), x, w)[0])

    assert matmul_flops(jax.make_jaxpr(jax.jit(loss))(W, X)) == 3 * LAYER
    # Backwards twice as much: for the layer's input and for its weights.
    assert matmul_flops(jax.make_jaxpr(jax.grad(loss))(W, X)) == 3 * LAYER * 3
    assert matmul_flops(jax.make_jaxpr(jax.grad(loss_remat))(W, X)) == 3 * LAYER * 4


def test_flops_of_a_while_loop_and_of_branches() -> None:
    def loop(w: jax.Array, x: jax.Array) -> jax.Array:
        x = jax.lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x @ w[0], x)
        return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ w[1], x)

    jaxpr = jax.make_jaxpr(loop)(W, X)
    assert matmul_flops(jaxpr, while_trips=0) == LAYER
    assert matmul_flops(jaxpr, while_trips=5) == 6 * LAYER


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_flops_of_the_tiny_llms_programs(accumulation: int) -> None:
    config = tiny_config(train__batch_size=8, train__accumulation=accumulation)
    config.eval.batch_size = 8
    programs = Programs(Settings.of(config), make_mesh(devices=jax.devices()[:1]))
    llm, encoder = programs.models.abstract_llm.config, programs.weights.input_encoder.config
    lengths, B, H, k = programs.lengths, 8, 512, config.plug.num_persona_tokens
    assert lengths == (224, 176, 1 + k, 48, 64, 40)  # 160 + 3 + 47, 160 + 3 rounded up to 16s

    D, V, N = llm.hidden_size, llm.vocab_size, llm.num_heads * llm.head_dim
    S, T = lengths.text + lengths.soft, lengths.target
    kernels = 2 * D * N + 2 * D * llm.num_kv_heads * llm.head_dim + 3 * D * llm.intermediate_size
    layers = llm.num_layers * 2 * B * S * kernels
    attention = llm.num_layers * 2 * 2 * B * S * S * N
    logits = 2 * B * T * D * V

    E, Q = encoder.hidden_size, lengths.query
    bert = 2 * B * Q * (4 * E * E + 2 * E * encoder.intermediate_size) + 2 * 2 * B * Q * Q * E
    bert *= encoder.num_layers

    U = config.plug.projector_size
    scores, first = 2 * B * H * E, 2 * B * H * E * U
    pooled, second = 2 * B * H * U, 2 * B * U * k * D
    instruction = 2 * (E * D + D * D)
    plug = scores + first + pooled + second + instruction

    losses = matmul_flops(programs.losses().jaxpr)
    assert losses == layers + attention + logits + bert + plug
    # The LLM's weights and the history get no gradients; both factors of its attention do. The
    # scores, half of attention's work, are made anew, and the encoder's values' mean, which the
    # gradient of the kernel behind it needs.
    made_anew = attention / 2 + encoder.num_layers * 2 * 2 * B * Q * Q * E
    assert matmul_flops(programs.train(remat=False).jaxpr) == pytest.approx(
        2 * (layers + logits + scores + first)
        + 3 * (attention + bert + pooled + second)
        + 3 * accumulation * instruction
        + made_anew,
        rel=1e-12,
    )


# Bytes.


def test_collectives_within_a_scan_are_counted_at_every_step() -> None:
    """On 8 devices, 5 steps of each kind; (16, 4) float32 are 256 bytes."""
    mesh = make_mesh(2, 4, 1)

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:  # x: a device's (8, 8)
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)  # (32, 8), 1024 bytes
        part = jax.lax.psum_scatter(whole * whole, "fsdp", tiled=True)  # (8, 8), 256 bytes
        part = jax.lax.all_to_all(jnp.sin(part), "fsdp", 0, 1, tiled=True)  # (2, 32)
        part = jax.lax.ppermute(
            part.reshape(8, 8) * x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]
        )
        return jax.lax.psum(jnp.cos(part), "data"), None

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P("fsdp"), check_vma=False)
    def run(x: jax.Array) -> jax.Array:
        return jax.lax.scan(step, x, None, length=5)[0]

    found = traffic(run.lower(jnp.ones((64, 8))).compile().as_text())
    expected = {
        "all-gather": 1024 * 3 / 4,
        "reduce-scatter": 256 * 3,
        "all-to-all": 256 * 3 / 4,
        "collective-permute": 256,
        "all-reduce": 2 * 256 / 2,
    }
    assert found.collectives == {kind: (5, 5 * size) for kind, size in expected.items()}
    assert found.received == 5 * sum(expected.values())


def test_hbm_bytes_of_a_scan_are_those_of_the_layers_that_it_reads() -> None:
    """A stack of 10 layers is read layer by layer, not as a whole at every step."""
    big = jax.ShapeDtypeStruct((10, 512, 512), jnp.float32)
    x = jax.ShapeDtypeStruct((512,), jnp.float32)
    text = jax.jit(lambda w, x: jax.lax.scan(dense, x, w)[0]).lower(big, x).compile().as_text()
    size = 10 * 512 * 512 * 4
    assert size < traffic(text).hbm < 4 * size


TPU_PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_slice (p.1: s32[], p.0: bf16[7,64,64]) -> bf16[1,64,64] {
  %p.1 = s32[]{:T(128)} parameter(1)
  %p.0 = bf16[7,64,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %slice.1 = bf16[1,64,64]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%p.0, %p.1)
}

%fused_start (p.2: bf16[64,16]) -> (bf16[64,16], bf16[64,64], u32[]) {
  %p.2 = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=9, \
replica_groups=[1,4]<=[4], dimensions={1}
  ROOT %start = (bf16[64,16]{1,0}, bf16[64,64]{1,0}, u32[]{:S(2)}) custom-call(%gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%fused_done (p.3: bf16[64,16], p.4: bf16[64,64]) -> bf16[64,64] {
  %p.3 = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.2 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%p.3), channel_id=9, \
replica_groups=[1,4]<=[4], dimensions={1}
  %p.4 = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %done = bf16[64,64]{1,0} custom-call(%p.4, %gather.2), \
custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (p.5: f32[64,64]) -> f32[64,32] {
  %p.5 = f32[64,64]{1,0:T(8,128)} parameter(0)
  %reduce.1 = f32[64,64]{1,0:T(8,128)S(1)} all-reduce(%p.5), channel_id=10, \
replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, to_apply=%add
  ROOT %half = f32[64,32]{1,0:T(8,128)S(1)} dynamic-slice(%reduce.1)
}

%body (state: (s32[], bf16[7,64,64], bf16[64,16], f32[7,64])) -> (s32[], f32[7,64]) {
  %state = (s32[], bf16[7,64,64]{2,1,0}, bf16[64,16]{1,0}, f32[7,64]{1,0}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%state), index=0
  %stack = bf16[7,64,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %shard = bf16[64,16]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %made = f32[7,64]{1,0:T(8,128)} get-tuple-element(%state), index=3
  %layer = bf16[1,64,64]{2,1,0:T(8,128)(2,1)S(1)} fusion(%stack, %i), kind=kLoop, \
calls=%fused_slice
  %started = (bf16[64,16]{1,0}, bf16[64,64]{1,0}, u32[]{:S(2)}) fusion(%shard), kind=kCustom, \
calls=%fused_start
  %whole = bf16[64,64]{1,0} get-tuple-element(%started), index=1
  %gathered = bf16[64,64]{1,0:T(8,128)(2,1)} fusion(%shard, %whole), kind=kCustom, \
calls=%fused_done
  %near = f32[1,64]{1,0:T(8,128)S(1)} custom-call(%layer), custom_call_target="x"
  %placed = f32[7,64]{1,0:T(8,128)} dynamic-update-slice(%made, %near, %i, %i)
  ROOT %next = (s32[], f32[7,64]{1,0}) tuple(%i, %placed)
}

%condition (state.1: (s32[], bf16[7,64,64], bf16[64,16], f32[7,64])) -> pred[] {
  %seven = s32[]{:T(128)S(6)} constant(7)
  %state.1 = (s32[], bf16[7,64,64]{2,1,0}, bf16[64,16]{1,0}, f32[7,64]{1,0}) parameter(0)
  %count = s32[]{:T(128)S(6)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)S(6)} compare(%count, %seven), direction=LT
}

ENTRY %main (x: f32[64,64]) -> f32[64,32] {
  %x = f32[64,64]{1,0:T(8,128)} parameter(0)
  %fetch = (f32[64,64]{1,0:T(8,128)S(1)}, f32[64,64]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %fetched = f32[64,64]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %first = (s32[], bf16[7,64,64]{2,1,0}, bf16[64,16]{1,0}, f32[7,64]{1,0}) tuple(%x)
  %loop = (s32[], f32[7,64]{1,0}) while(%first), condition=%condition, body=%body
  ROOT %out = f32[64,32]{1,0:T(8,128)S(1)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_traffic_of_a_tpu_program() -> None:
    """What is TPU's own: on-chip memory, collectives that run beside others, counts left out."""
    found = traffic(TPU_PROGRAM)
    gathered, scattered = 64 * 64 * 2, 64 * 32 * 4
    assert found.collectives["all-gather"] == (7, 7 * gathered * 3 / 4)  # once in two fusions
    assert found.collectives["reduce-scatter"] == (1, scattered * (2 - 1))
    assert found.collectives["all-reduce"] == (0, 0)
    layer, row, copied = 64 * 64 * 2, 64 * 4, 64 * 64 * 4
    assert found.hbm == copied + 7 * (
        layer  # is read from the stack, and written on the chip
        + 2 * gathered  # is written by the gathering; its operand counts with it
        + row  # of the result, whose others stay
    )


def test_a_loop_may_count_by_more_than_one() -> None:
    """As those that multiply with a shard while the next comes round the ring, from both sides."""
    root = "  ROOT %next = (s32[], f32[7,64]{1,0}) tuple("
    one, two = "%one = s32[] constant(1)\n", "%two = s32[] add(%half, %one)\n"
    counting = one + "  %half = s32[] add(%i, %one)\n  " + two
    text = TPU_PROGRAM.replace(root + "%i", f"  {counting}{root}%two")
    assert traffic(text).collectives["all-gather"] == (4, 4 * 64 * 64 * 2 * 3 / 4)


def test_a_loop_of_unknown_length_must_be_given_one() -> None:
    text = TPU_PROGRAM.replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match="does not say how often loop runs"):
        traffic(text)
    once, twice = traffic(text, while_trips=1), traffic(text, while_trips=2)
    assert (twice - once).collectives["all-gather"] == (1, 64 * 64 * 2 * 3 / 4)
    assert traffic(TPU_PROGRAM, while_trips=2) == traffic(TPU_PROGRAM)


@pytest.mark.parametrize(
    ("kind", "result", "group", "bytes_"),
    [
        ("all-gather", 80, 8, 70),
        ("all-reduce", 80, 8, 140),
        ("reduce-scatter", 10, 8, 70),
        ("all-to-all", 80, 8, 70),
        ("collective-permute", 80, 8, 80),
        ("all-reduce", 80, 1, 0),
    ],
)
def test_bytes_of_the_ring_algorithm(kind: str, result: int, group: int, bytes_: int) -> None:
    assert received(kind, result, group) == bytes_


# The roofline.


def fake_slice(shape: tuple[int, ...]) -> Slice:
    return Slice("v5e:fake", CHIPS["v5e"], shape, [None] * math.prod(shape))


def test_roofline_by_hand() -> None:
    moved = Traffic(819e9 * 0.002, {"all-gather": (3, 150e6), "all-reduce": (1, 50e6)})
    cost = Cost(flops=8 * 197e12 * 0.001, moved=moved)
    where = fake_slice((2, 4))
    assert where.ici_bandwidth == 3 * 50e9  # a link along the axis of 2, two along that of 4
    assert cost.bound(where) == pytest.approx(
        {"compute": 0.001, "HBM": 0.002, "ICI": 200e6 / 150e9}
    )
    assert cost.seconds(where) == pytest.approx(0.002)
    found = TrainPlan(64, 1, None, Memory(1, 1), cost, useful=cost.flops / 2)
    assert found.mfu(where) == pytest.approx(0.25)
    one = Cost(1.0, Traffic(0.0, {"all-gather": (0, 0.0)}))
    assert one.bound(fake_slice((1, 1)))["ICI"] == 0


@pytest.mark.parametrize(
    ("said", "used", "limit"),
    [
        (
            "the total memory required for HLO temporaries (20.50G) exceeds available HBM (15.75G)",
            20.5,
            15.75,
        ),
        ("Ran out of memory in memory space hbm. Used 512.00M of 15.75G hbm.", 0.5, 15.75),
    ],
)
def test_a_program_too_large_says_by_how_much(said: str, used: float, limit: float) -> None:
    error = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said} See https://openxla.org")
    assert too_large(error) == (used * GIB, limit * GIB)
    assert not Memory(0, *too_large(error)).fits and Memory(0, 1).fits


def test_other_compiler_errors_are_not_hidden() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        too_large(jax.errors.JaxRuntimeError("INTERNAL: a bug"))


# The programs.


@pytest.mark.slow
def test_the_state_lies_as_trainings_does(tmp_path: Path) -> None:
    config = tiny_config(train__batch_size=8, eval__batch_size=8)
    config.mesh.fsdp, config.mesh.tensor = 2, 2
    models = Models(Settings.of(config), tmp_path)
    method, optimizer = METHODS["pplug"], make_optimizer(1, 1e-4, 1e-4, 0.05, 1.0)
    weights = new_weights(models, method, config)
    state = init_optimizer(optimizer, weights, models.mesh)
    programs = Programs(Settings.of(config), models.mesh)

    def places(tree: object) -> list[tuple]:
        return [
            (jax.tree_util.keystr(path), x.shape, x.dtype, x.sharding)
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        ]

    planned = programs.weights, abstract_optimizer(optimizer, programs.weights, programs.mesh)
    for ours, real in zip(planned, (weights, state), strict=True):
        for mine, other in zip(places(ours), places(real), strict=True):
            assert mine[:3] == other[:3]
            assert mine[3].is_equivalent_to(other[3], len(mine[1])), mine[0]
    assert any(not place[3].is_fully_replicated for place in places(state))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((models.llm, weights)))
    assert programs.held(training=False) == held


def test_settings_that_cannot_work() -> None:
    eight = jax.devices()
    with pytest.raises(InputError, match=r"data=3 x fsdp=1 x tensor=1 needs 3 devices, but there"):
        make_mesh(3, 1, 1, eight)
    with pytest.raises(ConfigError, match=r"config\.train\.batch_size .*: 12 rows .* 8 parts"):
        Programs(Settings.of(tiny_config(train__batch_size=12)), make_mesh(devices=eight))
    with pytest.raises(ConfigError, match=r"config\.methods: nothing is trained"):
        Programs(Settings.of(tiny_config(methods=("none",))), make_mesh(devices=eight))
    with pytest.raises(ConfigError, match=r"config\.llm\.path: .*'org/unheard'.*Llama-3.1-8B"):
        Programs(Settings.of(tiny_config(llm__path="org/unheard")), make_mesh(devices=eight))
    with pytest.raises(ConfigError, match=r"config\.mesh\.slices: one slice is planned"):
        plan(tiny_config(mesh__slices=2), "v5e:2x2", search=False)


# About as many parameters as the names say; of Llama the exact number is published, and of two
# small LLMs it was counted in the checkpoint.
PARAMETERS = {
    "smollm2_135m": 134515008,
    "smollm2_360m": 0.362e9,
    "smollm2_1b7": 1.71e9,
    "gemma3_270m": 268098176,
    "gemma3_1b": 1.0e9,
    "gemma3_4b": 3.9e9,  # without its vision tower's 0.4e9
    "gemma3_12b": 11.8e9,
    "gemma3_27b": 27.0e9,
    "gemma2_9b": 9.24e9,
    "llama3_1b": 1.236e9,
    "llama3_8b": 8030261248,
    "llama3_70b": 70553706496,
    "qwen3_0b6": 0.6e9,
    "qwen3_8b": 8.19e9,
    "flan_t5_base": 0.248e9,
    "flan_t5_xxl": 11.1e9,
}


@pytest.mark.parametrize("name", llms.PRESETS)
def test_the_presets_shapes_are_known(name: str) -> None:
    config = lamp5.get_config(name)
    assert config.encoder.path in PUBLISHED
    llm = abstract_llm(published_directory(config.llm.path), dtype="bfloat16", quantize=None)
    close = 0 if isinstance(PARAMETERS[name], int) else 0.01
    assert parameter_count(llm) == pytest.approx(PARAMETERS[name], rel=close)
    assert llm.config.eos_ids


def test_meshes_of_a_slice() -> None:
    assert list(meshes(4)) == [(4, 1, 1), (2, 1, 2), (1, 1, 4), (2, 2, 1), (1, 2, 2), (1, 4, 1)]
    config = tiny_config(train__batch_size=4)
    where = Slice("v5e:2x4", CHIPS["v5e"], (2, 4), jax.devices())
    assert axes(roomy_mesh(Settings.of(config), where)) == {"data": 4, "fsdp": 1, "tensor": 2}
    config = lamp5.get_config("llama3_8b")
    assert axes(roomy_mesh(Settings.of(config), where)) == {"data": 2, "fsdp": 4, "tensor": 1}


def test_hours() -> None:
    assert "4 epochs of 2,000 examples are 500 steps: at least 1.00 hours" in hours(
        tiny_config(), 7.2
    )
    assert "12,500 examples" in hours(Settings.of(lamp4.get_config("gemma3_1b")), 1.0)
    assert re.search(
        "unknown.*product_review_writing", hours(Settings.of(longlamp.get_config("gemma3_1b")), 1)
    )


# The compiler.


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed: pip install -r requirements-plan\.txt"):
        find_slice("v5e:2x4")


@pytest.mark.parametrize("name", ["", "v9:2x2", "v5e", "v5e:", "v5e:2by4", "v5e:2x4x"])
def test_unknown_slices(name: str) -> None:
    with pytest.raises(InputError, match=r"unknown; known are v4, v5e, v5p, v6e and .*v5e:2x4"):
        find_slice(name)


def test_slices() -> None:
    pytest.importorskip("libtpu", reason="the TPU compiler is an extra (requirements-plan.txt)")
    for kind, chip in CHIPS.items():
        for shape in chip.slices:
            found = find_slice(f"{kind}:{shape}")
            assert len(found.devices) == math.prod(found.shape), found.name
    with pytest.raises(InputError, match="v5e:3x5: the TPU compiler does not know this shape"):
        find_slice("v5e:3x5")


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["libtpu", "CPU"])
def test_a_whole_plan(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    compiler: str,
) -> None:
    if compiler == "libtpu":
        reason = "the TPU compiler is an extra (requirements-plan.txt)"
        pytest.importorskip("libtpu", reason=reason)
    else:  # the same for four devices of this machine, with a TPU's figures
        where = Slice("v5e:2x2", CHIPS["v5e"], (2, 2), jax.devices()[:4])
        monkeypatch.setattr("pplug_jax.plan.planner.find_slice", lambda name: where)
    monkeypatch.chdir(tmp_path)
    config = tiny_config(plug__projector_size=128, eval__num_beams=2)
    config.mesh.fsdp = 2
    plan(config, "v5e:2x2", search=False)
    out = capsys.readouterr().out
    assert "4 x 16 GiB, mesh data=2 x fsdp=2 x tensor=1" in out
    assert re.search(r"fits: needs 0\.\d\d of 16 GiB", out)
    for line in ("compute, ms", "shortest step, ms", "highest MFU", "all-reduce"):
        assert re.search(rf"{line} *│ +\d", out), line
    assert "4 epochs of 2,000 examples are 500 steps" in out
    assert not list(tmp_path.iterdir())
