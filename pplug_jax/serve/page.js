"use strict";
const about = JSON.parse(document.getElementById("about").textContent);
const at = (id) => document.getElementById(id);
let person = null; // the name of who is open
let items = []; // theirs, the oldest first
let weights = new Map(); // of the last answer, by the items' ids
let asking = null; // stops the answers under way

const make = (tag, text, kind) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
};
const personPath = (...parts) => ["v1/personas", ...parts.map(encodeURIComponent)].join("/");

function tell(message) {
  at("trouble").textContent = message;
  at("trouble").hidden = !message;
}

async function call(method, path, body, signal) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
  const response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  if (response.ok) return response;
  if (response.status === 401) at("key-part").hidden = false;
  const said = await response.json().catch(() => null);
  throw new Error(said?.error?.message ?? `the server answers ${response.status}`);
}
const read = async (path) => (await call("GET", path)).json();

/** Do something that a button asks for, and tell what goes wrong. */
async function attempt(what) {
  tell("");
  try {
    await what();
  } catch (error) {
    if (error.name !== "AbortError") tell(error.message);
  }
}

async function listNames() {
  const { personas } = await read("v1/personas?limit=1000");
  at("names").replaceChildren(...personas.map((name) => Object.assign(make("option"), { value: name })));
}

async function readItems() {
  items = [];
  for (let after = 0; after !== null; ) {
    const page = await read(`${personPath(person, "items")}?limit=1000&after=${after}`);
    items.push(...page.items);
    after = page.next;
  }
  showItems();
}

function showItems() {
  const shown = [...items].reverse().sort((a, b) => (weights.get(b.id) ?? 0) - (weights.get(a.id) ?? 0));
  const most = Math.max(...weights.values(), 0);
  at("items").replaceChildren(...shown.map((item) => {
    const row = make("li");
    const weight = weights.get(item.id);
    row.style.setProperty("--share", most ? (weight ?? 0) / most : 0);
    const share = weight === undefined ? "" : `${(100 * weight).toFixed(weight < 0.0995 ? 1 : 0)}%`;
    const text = make("div");
    text.append(...about.fields.filter((field) => item[field]).map((field) => make("p", item[field])));
    const remove = make("button", "\u2715");
    remove.title = remove.ariaLabel = "Erase this item";
    remove.onclick = () => attempt(async () => {
      await call("DELETE", personPath(person, "items", item.id));
      await readItems();
    });
    row.append(make("span", share, "weight"), text, remove);
    return row;
  }));
  const count = items.length === 1 ? "1 item" : `${items.length} items`;
  const order = weights.size ? ", those that weighed most in the last answer first" : ", the newest first";
  at("count").textContent = items.length ? count + order : "nothing yet";
}

function close() {
  asking?.abort();
  person = null;
  weights = new Map();
  at("person").hidden = true;
  at("with-title").textContent = "With them";
  at("with-note").textContent = "open a person first";
  at("with").textContent = "";
}

at("choose").onsubmit = (event) => {
  event.preventDefault();
  attempt(async () => {
    close();
    const name = at("name").value.trim();
    await call("PUT", personPath(name));
    person = name;
    await readItems();
    at("who").textContent = at("name").value = name;
    at("with-title").textContent = `With ${name}`;
    at("with-note").textContent = "";
    at("person").hidden = false;
    await listNames();
  });
};

for (const field of about.fields) {
  const required = about.required.includes(field);
  const label = make("label", required ? field : `${field} (may be empty)`);
  const box = Object.assign(make(field === "date" ? "input" : "textarea"), { name: field, required });
  label.append(box);
  at("fields").append(label);
}

at("add").onsubmit = (event) => {
  event.preventDefault();
  const filled = [...new FormData(at("add"))].filter(([, text]) => text.trim());
  attempt(async () => {
    await call("POST", personPath(person, "items"), { items: [Object.fromEntries(filled)] });
    at("add").reset();
    await readItems();
  });
};

at("erase").onclick = () => {
  if (!confirm(`Erase ${person} and all that they wrote?`)) return;
  attempt(async () => {
    await call("DELETE", personPath(person));
    at("name").value = "";
    close();
    await listNames();
  });
};

/** Show an answer as it comes, and return the response's headers. */
async function answer(place, body, signal) {
  place.textContent = "";
  place.classList.add("going");
  try {
    const response = await call("POST", "v1/completions", { prompt: at("input").value, stream: true, ...body }, signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ; ) {
      const { done, value } = await reader.read();
      if (done) return response.headers;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: {")) continue;
        const part = JSON.parse(line.slice(6));
        if (part.error) throw new Error(part.error.message);
        if (part.persona) weights = new Map(part.persona.items.map(({ id, weight }) => [id, weight]));
        for (const choice of part.choices) place.textContent += choice.text;
      }
    }
  } finally {
    place.classList.remove("going");
  }
}

at("ask").onsubmit = (event) => {
  event.preventDefault();
  const stop = (asking = new AbortController());
  at("go").disabled = true;
  at("stop").hidden = false;
  attempt(async () => {
    const both = [answer(at("without"), {}, stop.signal)];
    if (person !== null) {
      both.push(answer(at("with"), { user: person, persona: { explain: true } }, stop.signal).then((headers) => {
        const count = headers.get("x-pplug-items");
        at("with-note").textContent = `${count} ${count === "1" ? "item was" : "items were"} read`;
        showItems();
      }));
    }
    const failed = (await Promise.allSettled(both)).find((each) => each.status === "rejected");
    if (failed) throw failed.reason;
  }).finally(() => {
    at("go").disabled = false;
    at("stop").hidden = true;
  });
};
at("stop").onclick = () => asking?.abort();

attempt(listNames);
