// The dashboard: one stream of figures from /v1/kv/stats, drawn as they come. Whatever came from elsewhere is set as text.

const $ = (id) => document.getElementById(id);
const KEY = "quire.key";
const STATES = { free: "free", cached: "cached", held: "held", shared: "shared", private: "tail or private" };
const ABOUT = {
  free: "nobody's", cached: "idle, found again when somebody asks", held: "read by one sequence, others would find it",
  shared: "read by several sequences", private: "read by one sequence, found by nobody",
};
let last = null; // the latest document
let stopped = null; // ends the stream that runs
let chosen = null; // of several models or adapters, the one that is looked at and talked to

// ---- numbers --------------------------------------------------------------------------------------------------------

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const count = (n) => (n < 100000 ? whole.format(n) : new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(n));
const rate = (n) => (n >= 10 || n === 0 ? whole.format(n) : n.toFixed(1));

function bytes(n) {
  let unit = 0;
  while (n >= 1024 && unit < 5) { n /= 1024; unit += 1; }
  return `${unit && n < 100 ? n.toFixed(n < 10 ? 2 : 1) : Math.round(n)} ${["B", "KiB", "MiB", "GiB", "TiB", "PiB"][unit]}`;
}

function seconds(s) {
  if (s === null) return "–";
  if (s < 0.01) return `${(s * 1000).toFixed(1)} ms`;
  return s < 1 ? `${Math.round(s * 1000)} ms` : `${s.toFixed(s < 10 ? 2 : 0)} s`;
}

const share = (part, all) => (all ? `${((100 * part) / all).toFixed(part && part < all && part / all > 0.995 ? 1 : 0)} %` : "–");
const sum = (list) => list.reduce((a, b) => a + b, 0);

// ---- drawing --------------------------------------------------------------------------------------------------------

function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

function make(tag, name = "", value = "") {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (value) node.textContent = value;
  return node;
}

// Children of `parent` for `items`: those that are there are filled anew, so that focus and scroll stay.
function each(parent, items, build, fill) {
  items.forEach((item, i) => fill(parent.children[i] ?? parent.appendChild(build()), item));
  while (parent.children.length > items.length) parent.lastChild.remove();
}

function cells(parent, rows, numbers) {
  each(parent, rows, () => make("tr"), (row, values) =>
    each(row, values, () => make("td"), (cell, value) => {
      cell.classList.toggle("n", [...row.children].indexOf(cell) >= numbers);
      text(cell, value);
    }));
}

function counts(list, pairs) {
  each(list, pairs.flatMap(([name, value, bad]) => [["dt", name, false], ["dd", value, bad]]), () => make("div"), () => {});
  pairs.forEach(([name, value, bad], i) => {
    for (const [at, tag, said] of [[2 * i, "dt", name], [2 * i + 1, "dd", value]]) {
      let node = list.children[at];
      if (node.localName !== tag) { const other = make(tag); node.replaceWith(other); node = other; }
      node.classList.toggle("alarm", Boolean(bad));
      text(node, said);
    }
  });
}

function path(svg, name, d) {
  let node = svg.querySelector(`.${name}`);
  if (!node) {
    node = document.createElementNS("http://www.w3.org/2000/svg", "path");
    node.setAttribute("class", name);
    svg.append(node);
  }
  node.setAttribute("d", d);
}

function line(svg, values) {
  const top = Math.max(1, ...values);
  const at = values.map((v, i) => `${((120 * i) / (values.length - 1)).toFixed(1)},${(27 - (25 * v) / top).toFixed(1)}`);
  path(svg, "under", `M0,28L${at.join("L")}L120,28Z`);
  path(svg, "good", `M${at.join("L")}`);
}

function columns(svg, below, above) {
  const top = Math.max(1, ...below.map((v, i) => v + above[i]));
  const boxes = (from, upto) => below.map((_, i) => {
    const [low, high] = [from(i), upto(i)].map((v) => 28 - (27 * v) / top);
    return low - high < 0.2 ? "" : `M${2 * i},${low.toFixed(1)}H${2 * i + 1.5}V${high.toFixed(1)}H${2 * i}Z`;
  }).join("");
  path(svg, "found", boxes(() => 0, (i) => below[i]));
  path(svg, "other", boxes((i) => below[i], (i) => below[i] + above[i]));
}

function drawMap(blocks) {
  const canvas = $("map"), style = getComputedStyle(document.documentElement);
  const paint = blocks.states.map((s) => style.getPropertyValue(`--${s}`).trim());
  const total = sum(blocks.cells.map(([n]) => n)), wide = canvas.clientWidth || 600;
  const across = Math.max(8, Math.min(total, Math.floor(wide / (wide < 500 ? 10 : 13))));
  const size = wide / across, gap = size > 5 ? 2 : 1, rows = Math.ceil(total / across), scale = devicePixelRatio || 1;
  const high = Math.ceil(rows * size);
  if (canvas.width !== Math.round(wide * scale) || canvas.height !== Math.round(high * scale)) {
    canvas.width = Math.round(wide * scale);
    canvas.height = Math.round(high * scale);
    canvas.style.height = `${high}px`;
  }
  const draw = canvas.getContext("2d");
  draw.setTransform(scale, 0, 0, scale, 0, 0);
  draw.clearRect(0, 0, wide, high);
  let cell = 0;
  for (const [n, places] of blocks.cells) {
    const all = sum(places);
    for (let i = 0; i < n; i += 1, cell += 1) {
      const x = (cell % across) * size, side = size - gap;
      let y = Math.floor(cell / across) * size;
      for (const s of [3, 2, 4, 1, 0]) {
        const tall = (side * places[s]) / all;
        if (tall > 0) { draw.fillStyle = paint[s]; draw.fillRect(x, y, side, tall); y += tall; }
      }
    }
  }
}

function branches(list, tree, hottest) {
  const rows = tree.more ? [...tree.branches, tree.more] : tree.branches;
  each(list, rows, () => {
    const item = make("li"), row = make("div", "branch"), heat = make("span", "heat");
    heat.append(make("i"));
    row.append(heat, make("span", "words"), make("span", "aside"));
    item.append(row);
    return item;
  }, (item, branch) => {
    const [heat, words, aside] = item.firstChild.children, rest = typeof branch === "number";
    item.firstChild.classList.toggle("rest", rest);
    words.classList.toggle("faint", rest || branch.text === undefined);
    if (rest) {
      text(words, branch === 1 ? "one more branch" : `${count(branch)} more branches`);
      text(aside, "");
      item.children[1]?.remove();
      return;
    }
    heat.firstChild.style.width = `${Math.max(4, (100 * branch.uses) / hottest)}%`;
    heat.firstChild.classList.toggle("held", branch.held_chunks > 0);
    text(words, branch.text === undefined ? `tokens ${count(branch.at)}–${count(branch.at + branch.tokens - 1)}` : branch.text.replace(/\s+/g, " ") || "∅");
    text(aside, `${branch.held_chunks ? "read now · " : ""}${count(branch.tokens)}${branch.cut ? "+" : ""} tokens · ${count(branch.uses)}×`);
    let below = item.children[1];
    if (branch.children.length + branch.more && !below) item.append((below = make("ul")));
    if (branch.children.length + branch.more) branches(below, { branches: branch.children, more: branch.more }, hottest);
    else below?.remove();
  });
}

function drawTree(trees) {
  const some = trees.filter((t) => t.branches.length), place = $("tree");
  $("tree-none").hidden = some.length > 0;
  place.hidden = !some.length;
  const hottest = Math.max(1, ...some.flatMap((t) => t.branches.map((b) => b.uses)));
  each(place, some, () => { const d = make("div"); d.append(make("h3"), make("ul")); return d; }, (d, tree) => {
    text(d.firstChild, tree.tenant);
    d.firstChild.hidden = some.length === 1;
    branches(d.lastChild, tree, hottest);
  });
}

// ---- a document -----------------------------------------------------------------------------------------------------

function show(s) {
  last = s;
  $("main").removeAttribute("aria-busy");
  document.title = `Quire · ${chosen ?? s.model}`;
  showServed(s);
  const model = $("model");
  if (!model.firstChild) model.append(make("b"), "");
  text(model.firstChild, s.model);
  model.lastChild.data = ` · kv ${s.kv} · keep ${s.keep} · share ${s.share}${s.you.operator ? "" : ` · key ${s.you.tenant}`}`;
  const { output, computed, found } = s.series;
  text($("out"), rate(sum(output.slice(-5)) / 5));
  line($("out-line"), output);
  text($("hit"), share(sum(found), sum(found) + sum(computed)));
  columns($("hit-line"), found, computed);
  for (const [id, w] of [["first", s.waits.first_token_s], ["between", s.waits.between_tokens_s]]) {
    text($(id), seconds(w.p50));
    text($(`${id}-more`), w.n ? `p90 ${seconds(w.p90)} · p99 ${seconds(w.p99)}` : "nothing in the last minute");
  }
  text($("running"), count(s.requests.running));
  const loading = s.engine?.loading ? ` · ${count(s.engine.loading)} loading` : "";
  text($("waiting"), `${count(s.requests.waiting)} waiting${loading} · ${bytes(s.requests.held_bytes)} held`);
  showMemory(s.blocks, s.tiers);
  drawTree(s.tree);
  cells($("tenants"), s.tenants.map((t) => [
    t.tenant, count(t.running), count(t.waiting), count(t.done), count(t.refused), count(t.prompt_tokens),
    share(t.found_tokens, t.prompt_tokens), count(t.output_tokens), bytes(t.held_bytes),
  ]), 1);
  text($("tenants-more"), s.tenants_left_out ? `and ${count(s.tenants_left_out)} more` : "since the start");
  showPrompts(s);
}

function showServed(s) {
  const select = $("served");
  select.hidden = s.served.length < 2;
  if (select.hidden || document.activeElement === select) return;
  each(select, s.served, () => make("option"), (option, name) => { text(option, name); option.value = name; });
  select.value = chosen ?? s.model;
}

function showMemory(b, tiers) {
  $("memory").hidden = !b;
  if (!b) return;
  text($("memory-sum"), `${bytes(b.held_bytes)} held · ${bytes(b.cached_bytes)} cached of ${bytes(b.total_bytes)}`);
  drawMap(b);
  const of = Object.fromEntries(b.states.map((s) => [s, sum(b.pools.map((p) => p.bytes[s]))]));
  of.free = b.free_bytes;
  each($("legend"), b.states, () => { const li = make("li"); li.append(make("span", "mark"), "", make("b")); return li; }, (li, s) => {
    li.firstChild.className = `mark ${s}`;
    li.title = ABOUT[s];
    li.childNodes[1].data = `${STATES[s]} `;
    text(li.lastChild, bytes(of[s]));
  });
  $("map").setAttribute("aria-label", `Map of the cache's blocks: ${b.states.map((s) => `${STATES[s]} ${bytes(of[s])}`).join(", ")}`);
  cells($("pools"), [...b.pools.map((p) => [
    p.codecs.join(", ") || "–", p.tier, `${p.block_tokens.join(" or ") || "–"} tokens`, bytes(p.block_bytes),
    bytes(p.bytes.held + p.bytes.shared + p.bytes.private), bytes(p.bytes.cached), bytes(p.bytes.free),
  ]), ...tiers.map((t) => [
    "all", t.ok ? t.tier : `${t.tier}, ${t.why || "resting"}`, `${count(t.blocks)} blocks`, "–", "–",
    bytes(t.used_bytes), t.capacity_bytes ? bytes(Math.max(0, t.capacity_bytes - t.used_bytes)) : "–",
  ])], 3);
}

function showPrompts(s) {
  const p = s.prompts, all = p.found + p.partly + p.missed;
  text($("prompts-sum"), p.tokens ? `${share(p.found_tokens, p.tokens)} of ${count(p.tokens)} tokens` : "");
  const parts = [["good", "found as far as it could be", p.found], ["part", "found in part", p.partly], ["miss", "not found", p.missed]];
  const bar = $("prompts-bar");
  each(bar, parts.filter((x) => x[2]), () => make("i"), (i, [name, , n]) => { i.className = name; i.style.width = `${(100 * n) / all}%`; });
  bar.setAttribute("aria-label", parts.map(([, name, n]) => `${name}: ${n}`).join(", "));
  counts($("prompts"), parts.map(([, name, n]) => [`Prompts ${name}`, count(n)]));
  const why = { differs: "another token comes next", evicted: "it was evicted", "never stored": "nobody had sent it", "other namespace": "only another key has it", "no checkpoint": "its tokens are there, the state behind them is not" };
  const reasons = Object.entries(s.misses).sort((a, b) => b[1] - a[1]);
  counts($("misses"), reasons.length ? reasons.map(([r, n]) => [why[r] ?? r, count(n)]) : [["no miss was explained yet", ""]]);
  const e = s.engine;
  $("checks-h").hidden = !e;
  counts($("checks"), e ? [
    ...Object.entries(e.corrupt).map(([name, n]) => [`corrupt: ${name}`, count(n), n > 0]),
    ...(e.audited === null ? [] : [["hits audited", count(e.audited)]]),
    ...(e.evicted_blocks === undefined ? [] : [["blocks evicted", count(e.evicted_blocks)]]),
    ["preempted samples", count(e.preemptions)],
  ] : []);
}

// ---- the stream -----------------------------------------------------------------------------------------------------

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

function say(state, message) {
  $("dot").className = `dot ${state}`;
  text($("status"), message);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    for (let end; (end = held.indexOf("\n\n")) >= 0; held = held.slice(end + 2)) {
      const data = held.slice(0, end).split("\n").filter((l) => l.startsWith("data:")).map((l) => l.slice(5).trim()).join("\n");
      if (data) yield data;
    }
  }
}

async function why(response) {
  try { return (await response.json()).error.message; } catch { return `the server answered ${response.status}`; }
}

async function watch(signal) {
  for (let pause = 500; !signal.aborted; pause = Math.min(10000, pause * 2)) {
    try {
      const of = chosen ? `?model=${encodeURIComponent(chosen)}` : "";
      const response = await fetch(`/v1/kv/stats${of}`, { headers: headers({ accept: "text/event-stream" }), signal });
      if (response.status === 401) { say("lost", "needs a key"); askKey(sessionStorage.getItem(KEY) ? await why(response) : null); return; }
      if (!response.ok) throw new Error(await why(response));
      $("key-button").hidden = !sessionStorage.getItem(KEY);
      for await (const data of events(response)) { show(JSON.parse(data)); say("live", "live"); pause = 500; }
      throw new Error("the server ended the stream");
    } catch (error) {
      if (signal.aborted) return;
      say("lost", error instanceof TypeError ? "no connection, trying again" : error.message);
    }
    await new Promise((wake) => { setTimeout(wake, pause); });
  }
}

function start() {
  stopped?.abort();
  if (document.hidden) return;
  stopped = new AbortController();
  watch(stopped.signal);
}

function askKey(problem) {
  text($("key-why"), problem ?? "Figures and chat need an API key. It stays in this tab until you close it.");
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

$("key-form").addEventListener("submit", (e) => {
  e.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  $("key-dialog").close();
  start();
});
$("served").addEventListener("change", (e) => { chosen = e.target.value; start(); });
$("key-button").addEventListener("click", () => { sessionStorage.removeItem(KEY); askKey(null); });
document.addEventListener("visibilitychange", () => {
  if (document.hidden) { stopped?.abort(); say("", "paused while hidden"); } else start();
});
new ResizeObserver(() => { if (last?.blocks) drawMap(last.blocks); }).observe($("memory"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (last?.blocks) drawMap(last.blocks); });

// ---- the chat box ---------------------------------------------------------------------------------------------------

const turns = [];
let answering = null;

function line_of(kind, said = "") {
  const node = make("p", `say ${kind}`, said), talk = $("talk");
  talk.append(node);
  talk.scrollTop = talk.scrollHeight;
  return node;
}

async function answer() {
  const talk = $("talk"), began = performance.now();
  const node = line_of("assistant");
  let first = null, usage = null, said = "";
  answering = new AbortController();
  text($("send"), "Stop");
  talk.setAttribute("aria-busy", "true");
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers({ "content-type": "application/json" }), signal: answering.signal,
      body: JSON.stringify({
        model: chosen ?? last?.model ?? null, messages: turns, max_tokens: Number($("most").value), stream: true, temperature: 0.7,
        stream_options: { include_usage: true },
      }),
    });
    if (!response.ok) throw new Error(await why(response));
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      const more = chunk.choices[0]?.delta.content;
      if (more) {
        first ??= performance.now() - began;
        said += more;
        const low = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 24;
        node.append(more);
        if (low) talk.scrollTop = talk.scrollHeight;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") { node.classList.add("failed"); node.append(said ? ` (${error.message})` : error.message); }
    else node.append(" (stopped)");
  }
  if (said) turns.push({ role: "assistant", content: said }); else turns.pop();
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    talk.append(make("p", "cost", `${usage.completion_tokens} tokens · first after ${seconds((first ?? 0) / 1000)} · ${cached} of ${usage.prompt_tokens} prompt tokens found`));
    talk.scrollTop = talk.scrollHeight;
  }
  talk.removeAttribute("aria-busy");
  answering = null;
  text($("send"), "Send");
}

$("ask").addEventListener("submit", (e) => {
  e.preventDefault();
  if (answering) { answering.abort(); return; }
  const said = $("text").value.trim();
  if (!said) return;
  $("text").value = "";
  turns.push({ role: "user", content: said });
  line_of("user", said);
  answer();
});
$("text").addEventListener("keydown", (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing && !answering) { e.preventDefault(); $("ask").requestSubmit(); }
});
$("clear").addEventListener("click", () => { answering?.abort(); turns.length = 0; $("talk").replaceChildren(); $("text").focus(); });

start();
