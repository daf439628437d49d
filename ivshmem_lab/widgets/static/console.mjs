// The consoles of the machines of a lab: a tab for each. What a guest wrote only ever becomes text nodes.
import { ask, follow, footer, h, keepKeys, keyed, mark, problems, remark, say, set, tellShown, walkTabs } from "./common.mjs";

const MOST_LINES = 10000;
const COLOURS = new Set(["black", "red", "green", "yellow", "blue", "magenta", "cyan", "white", "bold"]);

/** Where a text stands in another, without regard to case. */
export function places(text, wanted) {
  const found = [];
  if (!wanted) return found;
  const low = text.toLowerCase();
  const what = wanted.toLowerCase();
  for (let at = low.indexOf(what); at >= 0; at = low.indexOf(what, at + what.length)) found.push([at, at + what.length]);
  return found;
}

/** Put lines into a map, in the order of their numbers; a line that is told again takes the old one's place, those before `first` go. */
export function merge(store, message) {
  for (const [number, time, spans] of message.lines) store.set(number, { number, time, spans });
  // What a window asked for when it was opened may come after newer lines, and a map keeps the order of arrival.
  const lines = [...store.values()];
  if (lines.some((line, at) => at && line.number < lines[at - 1].number)) {
    store.clear();
    for (const line of lines.sort((one, other) => one.number - other.number)) store.set(line.number, line);
  }
  for (const number of store.keys()) {
    if (number >= message.first && store.size <= MOST_LINES) break;
    store.delete(number);
  }
}

function fill(row, line, wanted) {
  const hits = places(line.spans.map(([text]) => text).join(""), wanted);
  row.replaceChildren(h("time", {}, line.time));
  let at = 0;
  for (const [text, words] of line.spans) {
    const style = words.split(" ").filter((word) => COLOURS.has(word)).map((word) => `ivl-ansi-${word}`).join(" ");
    let from = 0;
    while (from < text.length) {
      const hit = hits.find(([, end]) => end > at + from);
      const inside = hit && hit[0] <= at + from;
      const to = hit ? Math.min(text.length, (inside ? hit[1] : hit[0]) - at) : text.length;
      row.append(h(inside ? "mark" : "span", style ? { class: style } : {}, text.slice(from, to)));
      from = to;
    }
    at += text.length;
  }
  return hits.length;
}

export function renderConsole({ model, el, signal }) {
  const stores = new Map();
  const asked = new Set();
  let current = null;
  let paused = false;
  let missed = 0;
  let hitAt = -1;

  const id = `ivl-console-${Math.random().toString(36).slice(2)}`;
  const tabs = h("div", { class: "ivl-tabs", role: "tablist", "aria-label": "Machines" });
  const pause = h("button", { type: "button", class: "ivl-button", "aria-pressed": "false", "data-testid": "pause" }, "Pause");
  const times = h("button", { type: "button", class: "ivl-button", "aria-pressed": "true" }, "Times");
  const clear = h("button", { type: "button", class: "ivl-button" }, "Clear");
  const save = h("button", { type: "button", class: "ivl-button" }, "Save");
  const search = h("input", { type: "search", class: "ivl-input ivl-search", placeholder: "Search", "aria-label": "Search this console" });
  const count = h("span", { class: "ivl-dim ivl-count", role: "status", "data-testid": "found" });
  const lines = h("div", { class: "ivl-lines", role: "log", tabindex: "0", "aria-label": "Console", "data-testid": "lines" });
  const empty = h("p", { class: "ivl-empty" }, "no output yet");
  const end = h("p", { class: "ivl-end", "data-testid": "ended", hidden: true });
  const more = h("button", { type: "button", class: "ivl-button ivl-more", hidden: true });
  const input = h("input", { class: "ivl-input", autocomplete: "off", spellcheck: "false", "aria-label": "Type a line to the guest", "data-testid": "input" });
  const send = h("button", { class: "ivl-button" }, "Send");
  const form = h("form", { class: "ivl-prompt" }, h("span", { "aria-hidden": "true" }, ">"), input, send);
  const panel = h("div", { role: "tabpanel", id, class: "ivl-panel" }, lines, empty, end, more, form);
  const problem = problems(model, signal);
  const root = h("section", { class: "ivl ivl-console", "aria-label": "Consoles" },
    h("header", { class: "ivl-head" }, h("h3", {}, "Consoles"), tabs, h("span", { class: "ivl-space" }), search, count, pause, times, clear, save),
    problem, panel, footer(model, signal));
  keepKeys(root);
  el.append(root);
  tellShown(model, signal);

  const store = () => stores.get(current) ?? new Map();
  // Whether the view follows the end. It goes on doing so while it is hidden behind another tab.
  let follows = true;
  const toEnd = () => {
    follows = true;
    lines.scrollTop = lines.scrollHeight;
  };
  lines.onscroll = () => {
    if (lines.clientHeight) follows = lines.scrollHeight - lines.scrollTop - lines.clientHeight < 24;
  };

  function draw() {
    const wanted = search.value;
    let hits = 0;
    keyed(lines, store().values(), (line) => line.number, () => h("div", { class: "ivl-line" }), (row, line) => {
      if (row.line !== line || row.wanted !== wanted) {
        row.hits = fill(row, line, wanted);
        row.line = line;
        row.wanted = wanted;
      }
      hits += row.hits;
    });
    empty.hidden = store().size > 0;
    lines.hidden = !store().size;
    say(count, wanted ? `${hits} found` : "");
    if (follows && hitAt < 0) toEnd();
  }

  let frame = 0;
  function drawSoon() {
    if (!frame) frame = requestAnimationFrame(() => ((frame = 0), draw()));
  }

  function hear(message) {
    if (message?.type !== "lines") return;
    if (!stores.has(message.vm)) stores.set(message.vm, new Map());
    merge(stores.get(message.vm), message);
    if (message.vm !== current) return;
    if (paused) {
      missed += message.lines.length;
      say(more, `${missed} new lines, go on`);
      more.hidden = !missed;
    } else drawSoon();
  }

  function choose(name) {
    current = name;
    hitAt = -1;
    lines.replaceChildren();
    update();
    draw();
    toEnd();
  }

  function update() {
    const list = model.get("tabs");
    if (!list.some((tab) => tab.name === current)) {
      current = list[0]?.name ?? null;
      lines.replaceChildren();
    }
    keyed(tabs, list, (tab) => tab.name, (tab) => h("button", { type: "button", role: "tab", class: "ivl-tab", "aria-controls": id, onclick: () => choose(tab.name) }, mark(tab.state), h("span", {}, tab.name), h("span", { class: "ivl-hidden" }, `, ${tab.word}`)),
      (button, tab) => {
        remark(button.firstElementChild, tab.state);
        say(button.lastElementChild, `, ${tab.word}`);
        set(button, { "aria-selected": String(tab.name === current), tabindex: tab.name === current ? "0" : "-1", id: `${id}-${tab.name}`, "data-state": tab.state });
      });
    const tab = list.find((each) => each.name === current);
    set(panel, { "aria-labelledby": tab ? `${id}-${tab.name}` : null, "data-vm": current });
    set(lines, { "aria-label": tab ? `Console of ${tab.name}` : "Console" });
    say(empty, tab ? "no output yet" : "no machine in this lab yet");
    say(end, tab?.note ?? "");
    end.hidden = !tab?.note;
    input.disabled = send.disabled = !tab?.can_type;
    set(input, { placeholder: tab?.can_type ? "" : tab ? `${tab.name} is ${tab.word}` : "" });
    for (const each of [pause, times, clear, save, search]) each.disabled = !tab;
    for (const { name } of list) {
      if (asked.has(name)) continue;
      asked.add(name);
      ask(model, "since", { vm: name, after: -1 }).catch((error) => problem.show(error.message));
    }
    drawSoon();
  }

  function goOn() {
    paused = false;
    missed = 0;
    more.hidden = true;
    set(pause, { "aria-pressed": "false" });
    draw();
    toEnd();
  }

  pause.onclick = () => {
    if (paused) goOn();
    else {
      paused = true;
      set(pause, { "aria-pressed": "true" });
    }
  };
  more.onclick = () => (goOn(), pause.focus());
  times.onclick = () => {
    const shown = times.getAttribute("aria-pressed") === "true";
    set(times, { "aria-pressed": String(!shown) });
    lines.classList.toggle("ivl-no-times", shown);
  };
  clear.onclick = () => ask(model, "clear", { vm: current }).then(() => {
    // The kernel's numbers go on: what is older than its first line is gone in every window.
    stores.get(current)?.clear();
    draw();
  }, (error) => problem.show(error.message));
  save.onclick = async () => {
    try {
      const text = await ask(model, "fetch", { vm: current, timestamps: times.getAttribute("aria-pressed") === "true" });
      const link = h("a", { href: URL.createObjectURL(new Blob([text], { type: "text/plain" })), download: `${current}.txt` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    } catch (error) {
      problem.show(error.message);
    }
  };
  search.oninput = () => ((hitAt = -1), draw());
  search.onkeydown = (event) => {
    if (event.key === "Escape") search.value = "";
    else if (event.key !== "Enter") return;
    draw();
    const marks = [...lines.querySelectorAll("mark")];
    if (!marks.length) return;
    hitAt = (hitAt + (event.shiftKey ? marks.length - 1 : 1)) % marks.length;
    for (const [number, each] of marks.entries()) each.classList.toggle("ivl-hit", number === hitAt);
    marks[hitAt].scrollIntoView({ block: "nearest" });
    say(count, `${hitAt + 1} of ${marks.length}`);
  };
  form.onsubmit = async (event) => {
    event.preventDefault();
    const text = input.value;
    input.value = "";
    set(form, { "aria-busy": "true" });
    try {
      await ask(model, "write", { vm: current, text });
    } catch (error) {
      if (!input.value) input.value = text;
      problem.show(error.message);
    }
    set(form, { "aria-busy": null });
    input.focus();
  };
  walkTabs(tabs, choose);
  const sizes = new ResizeObserver(() => follows && toEnd());
  sizes.observe(lines);
  signal?.addEventListener("abort", () => sizes.disconnect());
  model.on("msg:custom", hear);
  signal?.addEventListener("abort", () => model.off("msg:custom", hear));
  follow(model, ["tabs"], update, signal);
}

export default { render: renderConsole };
