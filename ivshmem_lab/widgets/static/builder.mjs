// The topology builder: palette, canvas, inspector, plan; everything is a draft until Apply.
import { ask, copyButton, follow, footer, h, keepKeys, keyed, mark, problems, say, set, tellShown } from "./common.mjs";
import { makeCanvas } from "./canvas.mjs";

const APPLY_LIMIT_MS = 300000;
const KEYS = [["c", "connect"], ["Enter", "inspect"], ["Del", "remove"], ["?", "all keys"]];
const ALL_KEYS = [["Tab", "walk the nodes and their devices"], ["arrows", "move by 8 px, with Shift by 1"], ["c", "connect: arrows choose, Enter takes"], ["Enter", "inspect"], ["Space", "start, pause or resume a machine"],
  ["Del", "remove, or disconnect a device"], ["Shift-click, Shift-drag", "select several"], ["Ctrl-A", "select all"], ["Ctrl-Z, Ctrl-Shift-Z", "undo, redo"], ["f", "fit"], ["+ -", "zoom, also Ctrl-wheel"], ["Ctrl-V", "import what was copied"], ["Esc", "cancel"]];

function keyList(keys) {
  return h("ul", { class: "ivl-keys", "aria-label": "Keys" }, ...keys.map(([key, words]) => h("li", {}, h("code", {}, key), h("span", {}, words))));
}

export function renderBuilder({ model, el, signal }) {
  const id = `ivl-builder-${Math.random().toString(36).slice(2)}`;
  let selected = [];
  let device = null;
  let removing = null;
  let shown = null; // what the inspector shows: "name" or "name#number"

  const button = (words, testid, onclick, more = {}) => h("button", { type: "button", class: "ivl-button", "data-testid": testid, onclick, ...more }, words);
  const problem = problems(model, signal);
  /** Ask Python; what it refuses is shown, and rejected. */
  const intend = async (op, words = {}, limitMs = undefined) => {
    try {
      return await ask(model, op, words, limitMs);
    } catch (error) {
      problem.show(error.message);
      throw error;
    }
  };
  const quietly = (op, words, limitMs) => intend(op, words, limitMs).catch(() => undefined);

  // -- toolbar -----------------------------------------------------------------------------------------

  const apply = button("Apply (no changes)", "apply", () => quietly("apply", {}, APPLY_LIMIT_MS), { class: "ivl-button ivl-primary" });
  const discard = button("Discard", "discard", () => quietly("discard"));
  const undo = button("Undo", "undo", () => quietly("undo"));
  const redo = button("Redo", "redo", () => quietly("redo"));
  const arrange = button("Layout", "layout", async () => (await quietly("arrange"), board.fit(), showZoom()));
  const fit = button("Fit", "fit", () => (board.fit(), showZoom()));
  const smaller = button("−", "zoom-out", () => (board.zoom(1 / 1.2), showZoom()), { "aria-label": "Zoom out" });
  const larger = button("+", "zoom-in", () => (board.zoom(1.2), showZoom()), { "aria-label": "Zoom in" });
  const percent = h("span", { class: "ivl-dim", "data-testid": "zoom" });
  const bring = button("Import…", "import", () => open("import"));
  const take = button("Export…", "export", () => open("export"));
  const showZoom = () => say(percent, `${Math.round(100 * board.scale())} %`);

  // -- palette and plan -------------------------------------------------------------------------------

  const palette = h("ul", { class: "ivl-palette", "aria-label": "Add to the topology" });
  const ghost = h("div", { class: "ivl-ghost", hidden: true });
  const add = async (kind, place = {}) => {
    const name = await quietly("add", { kind, ...place });
    if (name) (board.select([name]), board.focus(name));
  };
  for (const [kind, what, words] of model.get("palette")) {
    const item = h("div", { class: "ivl-thing" }, h("span", {}, h("b", {}, what), h("span", { class: "ivl-dim" }, words)));
    const plus = h("button", { type: "button", class: "ivl-icon", "aria-label": `Add: ${what}`, "data-testid": `add-${kind}`, onclick: () => add(kind) }, mark("plus"));
    item.onpointerdown = (event) => {
      if (event.button !== 0) return;
      event.preventDefault();
      const move = (now) => {
        ghost.hidden = false;
        say(ghost, what);
        ghost.style.transform = `translate(${now.clientX + 8}px, ${now.clientY + 8}px)`;
      };
      const end = (now) => {
        window.removeEventListener("pointermove", move);
        window.removeEventListener("pointerup", end);
        const dropped = !ghost.hidden && board.contains(now.clientX, now.clientY);
        ghost.hidden = true;
        if (!dropped) return;
        const [x, y] = board.toSheet(now.clientX, now.clientY);
        add(kind, { x: Math.max(0, x - 108), y: Math.max(0, y - 20) });
      };
      window.addEventListener("pointermove", move);
      window.addEventListener("pointerup", end);
    };
    palette.append(h("li", { "data-testid": `palette-${kind}` }, item, plus));
  }
  const planHead = h("h4", { id: `${id}-plan` }, "Plan");
  const plan = h("ol", { class: "ivl-plan", "aria-labelledby": `${id}-plan`, "data-testid": "plan", tabindex: "0" });
  const wrong = h("ul", { class: "ivl-wrong", "aria-label": "What is wrong", "data-testid": "wrong" });
  const keys = keyList(KEYS);
  const left = h("div", { class: "ivl-left" }, h("h4", {}, "Add to the topology"), palette, planHead, plan, wrong, keys);

  // -- inspector ---------------------------------------------------------------------------------------

  const inspectorHead = h("h4", { "data-testid": "inspected" });
  const inspectorWords = h("p", { class: "ivl-dim" });
  const form = h("form", { class: "ivl-fields", onsubmit: (event) => event.preventDefault() });
  const removeButton = button("Remove", "remove", () => ask4(selected, device));
  const inspector = h("div", { class: "ivl-inspector", role: "region", "aria-label": "Inspector", "data-testid": "inspector" }, inspectorHead, inspectorWords, form, h("div", { class: "ivl-row" }, removeButton));

  function makeField(each) {
    const input = each.choices.length
      ? h("select", { class: "ivl-input" }, ...each.choices.map((choice) => h("option", { value: choice }, choice || each.empty)))
      : h("input", { class: "ivl-input", type: "text", placeholder: each.empty, spellcheck: "false" });
    const refused = h("span", { class: "ivl-refused", role: "alert" });
    input.dataset.testid = `field-${each.key}`;
    input.onchange = async () => {
      const name = selected[0];
      say(refused, "");
      try {
        const now = await ask(model, "change", { name, key: each.key, value: input.value, ...(device === null ? {} : { device }) });
        if (now && now !== name) board.select([now]);
      } catch (error) {
        say(refused, error.message);
        input.dataset.refused = "true";
      }
    };
    input.oninput = () => delete input.dataset.refused;
    return h("label", { class: "ivl-field" }, h("span", {}, each.label), input, refused);
  }

  function inspect() {
    const node = selected.length === 1 ? nodes().find((each) => each.name === selected[0]) : null;
    const row = node && device !== null ? node.devices[device] : null;
    const now = node ? `${node.name}${row ? `#${device}` : ""}` : null;
    if (now !== shown) form.replaceChildren();
    shown = now;
    say(inspectorHead, row ? `${node.name} / ${row.target}` : node ? node.name : selected.length ? `${selected.length} selected` : "Nothing selected");
    say(inspectorWords, row ? (row.new ? "a device of the draft" : model.get("drawing").words[`${node.name}-${device}`] ?? "") : node ? `${node.kind}: ${node.words}` : selected.length ? "Drag one of them to move all." : "Select a node or a device to see and change what it is.");
    keyed(form, (row ?? node)?.fields ?? [], (each) => each.key, makeField, (label, each) => {
      const input = label.children[1];
      if (document.activeElement !== input && !input.dataset.refused && input.value !== each.value) input.value = each.value;
    });
    removeButton.hidden = !selected.length;
    say(removeButton, row ? "Disconnect" : "Remove");
  }

  // -- questions, texts --------------------------------------------------------------------------------

  const question = h("p", { id: `${id}-question` });
  const yes = button("Remove", "yes", () => remove(removing), { class: "ivl-button ivl-warn" });
  const no = button("Keep", "no", () => ask4(null));
  const dialog = h("div", { class: "ivl-question", role: "alertdialog", "aria-labelledby": `${id}-question`, "data-testid": "question", hidden: true }, question, h("div", { class: "ivl-row" }, no, yes));
  dialog.onkeydown = (event) => event.key === "Escape" && ask4(null);

  const area = h("textarea", { class: "ivl-input ivl-text", rows: "8", spellcheck: "false", "aria-label": "Text", "data-testid": "text" });
  const form2 = h("select", { class: "ivl-input", "aria-label": "Format", "data-testid": "format" }, ...model.get("formats").map(([name, what]) => h("option", { value: name }, `${name}: ${what}`)));
  const go = button("Draw it", "load", () => load(area.value), { class: "ivl-button ivl-primary" });
  const lost = h("ul", { class: "ivl-lost", "aria-label": "What is lost", "data-testid": "lost", tabindex: "0" });
  const textHead = h("h4");
  const copyText = copyButton("Copy the text", () => area.value);
  const done = button("Close", "close-text", () => open(null));
  const texts = h("div", { class: "ivl-texts", "data-testid": "texts", hidden: true }, h("div", { class: "ivl-row" }, textHead, form2, h("span", { class: "ivl-space" }), copyText, go, done), area, lost);
  texts.onkeydown = (event) => event.key === "Escape" && open(null);
  form2.onchange = () => exported();

  function open(kind, text = "") {
    const was = texts.hidden ? null : texts.dataset.kind;
    texts.hidden = !kind;
    if (!kind) return (was === "export" ? take : bring).focus();
    texts.dataset.kind = kind;
    say(textHead, { import: "Paste a topology file, QEMU command lines, libvirt XML or Python", export: "Export as", log: "Log" }[kind]);
    form2.hidden = kind !== "export";
    go.hidden = kind !== "import";
    copyText.hidden = kind === "import";
    area.readOnly = kind !== "import";
    area.value = text;
    lost.replaceChildren();
    if (kind === "export") exported();
    (kind === "export" ? form2 : area).focus();
  }

  const listLost = (items) => keyed(lost, items.map((text, number) => ({ text, number })), (each) => `${each.number}-${each.text}`, (each) => h("li", {}, each.text));

  async function exported() {
    const answer = await quietly("export", { form: form2.value });
    if (!answer || texts.dataset.kind !== "export") return;
    area.value = answer.text;
    listLost(answer.lost);
  }

  async function load(text) {
    const items = await quietly("load", { text });
    if (!items) return;
    if (items.length) {
      if (texts.hidden) open("import", text);
      listLost(items);
    } else if (!texts.hidden) open(null);
    board.fit();
    showZoom();
  }

  /** Ask before something is removed that is there; the draft alone is not worth a question. */
  function ask4(names, number = null) {
    removing = names ? { names, device: number } : null;
    dialog.hidden = true;
    if (!names?.length) return board.focus(selected[0]);
    const applied = names.filter((name) => nodes().find((each) => each.name === name)?.applied);
    if (!applied.length || number !== null) return remove(removing);
    say(question, `Remove ${applied.join(", ")} from the draft? Apply then ends ${applied.length === 1 ? "it" : "them"}, and what is in memory is lost. Undo brings the drawing back.`);
    dialog.hidden = false;
    no.focus();
  }

  async function remove({ names, device: number }) {
    dialog.hidden = true;
    if (number !== null) await quietly("disconnect", { name: names[0], device: number });
    else await quietly("remove", { names });
    board.element.focus();
  }

  // -- together ----------------------------------------------------------------------------------------

  const board = makeCanvas({
    intend,
    onSelect: (names, number) => ((selected = names), (device = number), inspect()),
    onInspect: () => form.querySelector("input, select")?.focus(),
    onDelete: ask4,
    onLog: async (name) => open("log", (await quietly("log", { name })) ?? ""),
    onText: (text) => load(text),
    signal,
  });
  const help = h("div", { class: "ivl-help", hidden: true, "data-testid": "keys" }, keyList(ALL_KEYS));
  const progress = h("p", { class: "ivl-applying", role: "status", "data-testid": "applying", hidden: true });
  const root = h("section", { class: "ivl ivl-builder", "aria-label": "Topology builder" },
    h("header", { class: "ivl-head ivl-toolbar" }, h("h3", {}, "Topology"), apply, discard, undo, redo, arrange, fit, smaller, percent, larger, h("span", { class: "ivl-space" }), bring, take),
    problem, dialog, progress, texts, h("div", { class: "ivl-bench" }, left, board.element, inspector), help, footer(model, signal), ghost);
  keepKeys(root);
  root.addEventListener("keydown", (event) => {
    if (event.key === "?" && !event.target.matches("input, textarea, select")) help.hidden = !help.hidden;
  });
  el.append(root);
  tellShown(model, signal);

  const nodes = () => model.get("drawing").nodes ?? [];

  function update() {
    const found = model.get("problems");
    const drawing = model.get("drawing");
    const byName = new Map(found.map((each) => [each.name, each.text]));
    board.update({ nodes: (drawing.nodes ?? []).map((node) => ({ ...node, wrong: byName.get(node.name) ?? "" })), words: drawing.words ?? {}, rates: model.get("rates") ?? {} });
    const changes = model.get("changes");
    const now = model.get("applying");
    const busy = now.of !== undefined;
    const count = changes.length;
    say(apply, busy ? `Applying ${now.done} of ${now.of}` : found.length ? "Apply (not yet)" : count ? `Apply (${count} change${count === 1 ? "" : "s"})` : "Apply (no changes)");
    apply.disabled = busy || !count || found.length > 0;
    discard.disabled = busy || (!count && !found.length);
    const past = model.get("history");
    set(undo, { title: past.undo ? `Undo: ${past.undo}` : "Nothing to undo" });
    set(redo, { title: past.redo ? `Redo: ${past.redo}` : "Nothing to redo" });
    undo.disabled = busy || !past.undo;
    redo.disabled = busy || !past.redo;
    say(planHead, count ? `Plan: ${count} change${count === 1 ? "" : "s"}` : "Plan: no changes");
    keyed(plan, changes.map((text, number) => ({ text, number })), (each) => `${each.number}-${each.text}`, (each) => h("li", {}, each.text));
    keyed(wrong, found.map((each, number) => ({ ...each, number })), (each) => `${each.number}-${each.text}`, (each) => h("li", {}, each.text));
    wrong.hidden = !found.length;
    progress.hidden = !busy;
    say(progress, busy ? `${now.done} of ${now.of}: ${now.step}` : "");
    inspect();
    showZoom();
  }
  follow(model, ["drawing", "rates", "changes", "problems", "history", "applying"], update, signal);
}

export default { render: renderBuilder };
