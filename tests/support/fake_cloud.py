"""`gcloud` and `kubectl` of a cloud that is the directory CLOUD.

A command for a worker is run, in a home directory that stands for the machine. Rules say what
goes wrong: {"on": text of the command, "do": ..., "times": 1, "after": 0 such commands}.
Started some hundred times, so nothing is imported that is not needed.
"""

import os
import sys

WORKERS = 2  # of every TPU VM

cloud = os.environ["CLOUD"]
argv = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(f"{cloud}/calls", "a") as file:
    file.write(repr(argv) + "\n")


def load(name):
    with open(f"{cloud}/{name}") as file:
        return eval(file.read())


def store(name, content):
    with open(f"{cloud}/{name}", "w") as file:
        file.write(repr(content))


def broken_rule():
    rules, found = load("rules"), {"do": None}
    for rule in rules:
        if rule["on"] in " ".join(argv) and rule.setdefault("times", 1):
            if rule.get("after"):
                rule["after"] -= 1
            else:
                rule["times"] -= 1
                found = rule
            break
    store("rules", rules)
    return found


def flag(name):
    return next((a.partition("=")[2] for a in argv if a.startswith(f"--{name}=")), "")


# gcloud's own flags, as of version 528.
CREATE = "accelerator-type spot reserved internal-ips network subnetwork service-account data-disk"
CREATE += " labels tags metadata"
CONNECT = "worker ssh-key-file internal-ip"
KNOWN = {
    "tpu-vm create": f"{CREATE} version",
    "tpu-vm ssh": f"{CONNECT} command ssh-flag",
    "tpu-vm scp": f"{CONNECT} scp-flag",
    "tpu-vm list": "format filter",
    "tpu-vm delete": "",
    "queued-resources create": f"{CREATE} runtime-version node-id node-count",
    "queued-resources ssh": f"{CONNECT} tunnel-through-iap node command ssh-flag",
    "queued-resources scp": f"{CONNECT} tunnel-through-iap node scp-flag",
    "queued-resources list": "format filter",
    "queued-resources describe": "format",
    "queued-resources delete": "force",
    "alpha tpu-vm ssh": f"{CONNECT} tunnel-through-iap command ssh-flag",
    "alpha tpu-vm scp": f"{CONNECT} tunnel-through-iap scp-flag",
}


def refuse_unknown():
    known = (KNOWN[track + " ".join(argv[3:5])] + " project zone quiet").split()
    flags = [each for each in argv[5:] if each.startswith("-")]
    unknown = [each for each in flags if each[2:].partition("=")[0] not in known]
    if unknown:
        print("ERROR: unrecognized arguments:", *unknown, file=sys.stderr)
        sys.exit(2)


def subject():
    if flag("filter"):
        return flag("filter").partition("$")[0].replace(")", "/").rpartition("/")[2]
    named = [each for each in argv[5:] if not each.startswith("-")] or [""]
    return named[-1][:-1] if "scp" in argv else named[0]


def fail(rule):
    print(rule.get("text", "ERROR: something"), file=sys.stderr)
    sys.exit(rule.get("status", 1))


def nodes():
    return sorted(name for name, node in world["nodes"].items() if node["owner"] == target)


def homes(every_node, every_worker):
    for node in nodes() if every_node else nodes()[:1]:
        for worker in range(WORKERS if every_worker else 1):
            home = f"{cloud}/homes/{node}/w{worker}"
            os.makedirs(home, exist_ok=True)
            yield home


def signal_jobs(number=15):
    for home in homes(True, True):
        if os.path.exists(f"{home}/job/pid"):
            with open(f"{home}/job/pid") as file:
                pid = int(file.read())
            try:
                os.killpg(pid, number)
            except ProcessLookupError:
                pass


def take_away(states):
    signal_jobs()
    for node in nodes():
        os.system(f"rm -rf {cloud}/homes/{node}")
    if states == ["ACTIVE"]:  # as yet; one node tells already
        world["nodes"][nodes()[-1]]["state"] = "PREEMPTED"
    else:
        for node in nodes():
            del world["nodes"][node]
        world["queued"][target] = states
    store("world", world)


def start(home, **settings):
    import subprocess

    command, env = ["bash", "-c", flag("command")], {**os.environ, "HOME": home}
    settings["start_new_session"] = True  # another machine: a Ctrl-C here is none there
    return subprocess.Popen(command, env=env, cwd=home, text=True, **settings)


def disturbed_follow():
    following = start(next(homes(False, False)), stdout=-1)
    for line in following.stdout:
        print(line, end="", flush=True)
        if "step 1" in line and wrong["do"] == "preempt":
            take_away(wrong["states"])
            if not wrong["times"]:
                store("enough", True)
        if "step 1" in line and wrong["do"] in ("preempt", "drop"):
            following.kill()
            sys.exit(255)
        if "waiting" in line and wrong["do"] == "interrupt":
            following.kill()
            os.killpg(0, 2)
        if "waiting" in line and wrong["do"] == "signal":
            signal_jobs(wrong["number"])
    sys.exit(following.wait())


def ssh():
    sys.stdin.read()  # as ssh does; an answer to a later question must not be lost
    if wrong["do"] in ("preempt", "drop", "interrupt", "signal"):
        disturbed_follow()
    if wrong["do"] == "lose":
        os.system(f"rm -rf {cloud}/homes/{nodes()[-1]}/w1")
    all_nodes = flag("node") in ("", "all")
    running = [start(home) for home in homes(all_nodes, flag("worker") == "all")]
    sys.exit(max(each.wait() for each in running))


def gcloud():
    refuse_unknown()
    kind, verb = argv[3:5]
    if verb == "create":
        count, queued = int(flag("node-count") or 1), kind != "tpu-vm"
        for node in [target] if count == 1 else [f"{target}-{i}" for i in range(count)]:
            world["nodes"][node] = {"state": "READY", "owner": target, "queued": queued}
        if queued:
            world["queued"][target] = wrong.get("states", ["WAITING_FOR_RESOURCES", "ACTIVE"])
    elif verb == "list" and kind == "queued-resources":
        states = world["queued"].get(target, [])
        print(*states[:1])
        world["queued"][target] = states[1:] or states
    elif verb == "list":
        for node in map(world["nodes"].get, nodes()):
            if node["queued"] == flag("filter").startswith("queuedResource"):
                print(node["state"])
    elif verb == "describe":
        print("Quota TPUS exceeded")
    elif verb == "delete":
        for node in nodes():
            del world["nodes"][node]
            os.system(f"rm -rf {cloud}/homes/{node}")
        world["queued"].pop(target, None)
    elif verb == "scp":
        for home in homes(True, True):
            os.system(f"cp {' '.join(argv[5 : argv.index(target + ':')])} {home}")
    elif verb == "ssh":
        ssh()
    store("world", world)


def kubectl():
    states, command = load("states"), [each for each in argv[1:] if not each.startswith("-")]
    if command[0] == "create":
        with open(f"{cloud}/manifest", "w") as file:
            file.write(sys.stdin.read())
    elif command[:2] == ["get", "pods"] and states[0] == "Running":
        print("pod/first")
    elif command[0] == "logs":
        print("step 1")
    elif command[:2] == ["get", "jobset"]:
        print(states[0] if states[0] in ("Completed", "Failed") else "")
        store("states", states[1:])


if __name__ == "__main__":
    if argv[1] == "storage":  # of a worker, several at a time
        os.execlp("cp", "cp", "-r", argv[-2].replace("gs://", f"{cloud}/bucket/") + "/.", argv[-1])
    track = "alpha " if argv[1] == "alpha" else ""
    if track:
        del argv[1]
    world, wrong, target = load("world"), broken_rule(), subject()
    if wrong["do"] == "fail":
        fail(wrong)
    if wrong["do"] == "suspend":
        take_away(["SUSPENDED"])
    globals()[argv[0]]()
    if wrong["do"] == "fail late":
        fail(wrong)
