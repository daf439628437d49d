// The bench: a drawing of the lab, and the panels beside it; below 1200 px one tab list.
import { ask, follow, footer, h, keepKeys, keyed, mark, problems, remark, say, set, walkTabs } from "./common.mjs";
import { renderHotplug } from "./hotplug.mjs";
import { renderConsole } from "./console.mjs";

const WIDE_PX = 1200;
const HIGHEST_PX = 520;
const SMALLEST = 0.5;
const PARTS = [["topology", "Topology"], ["hotplug", "Hot-plug"], ["console", "Consoles"]];

function svg(tag, attributes = {}) {
  return set(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes);
}

function renderDrawing(model, el, signal) {
  const lines = svg("svg", { class: "ivl-wires", "aria-hidden": "true" });
  const boxes = h("div", { class: "ivl-nodes", role: "group", "aria-label": "Topology" });
  const badges = h("ul", { class: "ivl-badges", "aria-label": "Links" });
  const stage = h("div", { class: "ivl-stage" }, lines, badges, boxes);
  const empty = h("p", { class: "ivl-empty" }, "Nothing in this lab yet. ", h("code", {}, 'board = lab.server("board", size="4M", vectors=2)'));
  const canvas = h("div", { class: "ivl-canvas", tabindex: "0", role: "region", "aria-label": "Drawing of the lab" }, stage, empty);
  el.append(canvas);
  const fit = () => {
    const { width = 1, height = 1 } = model.get("drawing");
    const room = canvas.clientWidth || width;
    stage.style.zoom = Math.max(SMALLEST, Math.min(1, room / width, HIGHEST_PX / height));
  };
  const sizes = new ResizeObserver(fit);
  sizes.observe(canvas);
  signal?.addEventListener("abort", () => sizes.disconnect());
  follow(model, ["drawing"], () => {
    const drawing = model.get("drawing");
    const nodes = drawing.nodes ?? [];
    empty.hidden = nodes.length > 0;
    stage.hidden = !nodes.length;
    stage.style.width = `${drawing.width}px`;
    stage.style.height = `${drawing.height}px`;
    fit();
    set(lines, { width: drawing.width, height: drawing.height });
    keyed(lines, drawing.wires ?? [], (wire) => wire.key, () => svg("path"), (path, wire) => set(path, { d: wire.path }));
    keyed(badges, (drawing.wires ?? []).filter((wire) => wire.words), (wire) => wire.key, () => h("li", { class: "ivl-badge" }), (badge, wire) => {
      say(badge, wire.words);
      badge.style.left = `${wire.x}px`;
      badge.style.top = `${wire.y}px`;
    });
    keyed(boxes, nodes, (node) => node.name,
      (node) => h("div", { class: "ivl-node", role: "img" }, h("div", { class: "ivl-node-head" }, h("b", {}, node.name), h("span", { class: "ivl-dim" })), h("div", { class: "ivl-node-state" }, mark(node.mark), h("span", {})), h("div", { class: "ivl-node-devices" })),
      (box, node) => {
        const [head, state, devices] = box.children;
        say(head.lastElementChild, node.kind);
        remark(state.firstElementChild, node.mark);
        say(state.lastElementChild, node.words);
        set(box, { "aria-label": node.label, "data-state": node.mark, title: node.words });
        Object.assign(box.style, { left: `${node.x}px`, top: `${node.y}px`, width: `${node.width}px`, height: `${node.height}px` });
        keyed(devices, node.devices.map((name, number) => ({ name, number })), (each) => each.number, () => h("div", { class: "ivl-device" }), (row, each) => say(row, each.name));
      });
  }, signal);
}

export async function renderDashboard({ model, el, signal }) {
  const id = `ivl-dashboard-${Math.random().toString(36).slice(2)}`;
  let chosen = "topology";
  const start = h("button", { type: "button", class: "ivl-button", "data-testid": "start-all" }, mark("running"), "Start all");
  const stop = h("button", { type: "button", class: "ivl-button", "data-testid": "stop-all" }, mark("stopped"), "Stop all…");
  const summary = h("span", { "data-testid": "summary" });
  const question = h("p", { id: `${id}-question` });
  const yes = h("button", { type: "button", class: "ivl-button ivl-warn" }, "Stop all");
  const no = h("button", { type: "button", class: "ivl-button" }, "Keep running");
  const dialog = h("div", { class: "ivl-question", role: "alertdialog", "aria-labelledby": `${id}-question`, hidden: true }, question, h("div", { class: "ivl-row" }, no, yes));
  const problem = problems(model, signal);
  const tabs = h("div", { class: "ivl-tabs", role: "tablist", "aria-label": "Panels" });
  const panels = Object.fromEntries(PARTS.map(([name]) => [name, h("div", { class: `ivl-part ivl-part-${name}`, id: `${id}-${name}` })]));
  const root = h("section", { class: "ivl ivl-dashboard", "aria-label": "Lab" },
    h("header", { class: "ivl-head ivl-toolbar" }, h("h3", {}, "Lab"), start, stop, h("span", { class: "ivl-space" }), summary),
    dialog, problem, tabs, h("div", { class: "ivl-parts" }, ...Object.values(panels)), footer(model, signal));
  keepKeys(root);
  el.append(root);

  function update() {
    const wide = root.clientWidth >= WIDE_PX || root.clientWidth === 0;
    root.classList.toggle("ivl-wide", wide);
    tabs.hidden = wide;
    keyed(tabs, PARTS, ([name]) => name, ([name, words]) => h("button", { type: "button", role: "tab", class: "ivl-tab", id: `${id}-tab-${name}`, "aria-controls": `${id}-${name}`, onclick: () => choose(name) }, words),
      (tab, [name]) => set(tab, { "aria-selected": String(name === chosen), tabindex: name === chosen ? "0" : "-1" }));
    for (const [name, panel] of Object.entries(panels)) {
      panel.hidden = !wide && name !== chosen;
      set(panel, wide ? { role: null, "aria-labelledby": null } : { role: "tabpanel", "aria-labelledby": `${id}-tab-${name}` });
    }
  }

  function choose(name) {
    chosen = name;
    update();
  }

  const intend = (op) => ask(model, op, {}, 120000).catch((error) => problem.show(error.message));
  start.onclick = () => intend("start");
  stop.onclick = () => {
    dialog.hidden = false;
    no.focus();
  };
  no.onclick = () => {
    dialog.hidden = true;
    stop.focus();
  };
  yes.onclick = () => {
    no.click();
    intend("stop");
  };
  dialog.onkeydown = (event) => {
    if (event.key === "Escape") no.click();
  };
  walkTabs(tabs, choose);
  const sizes = new ResizeObserver(update);
  sizes.observe(root);
  signal?.addEventListener("abort", () => sizes.disconnect());
  follow(model, ["summary", "question"], () => {
    say(summary, model.get("summary"));
    say(question, model.get("question"));
    stop.disabled = !model.get("question");
    if (stop.disabled) dialog.hidden = true;
  }, signal);
  update();

  renderDrawing(model, panels.topology, signal);
  for (const [name, render] of [["hotplug", renderHotplug], ["console", renderConsole]]) {
    const part = await model.widget_manager.get_model(model.get(name).replace("IPY_MODEL_", ""));
    render({ model: part, el: panels[name], signal });
  }
}

export default { render: renderDashboard };
