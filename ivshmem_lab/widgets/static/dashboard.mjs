// The bench: a drawing of the lab, and the panels beside it; below 1200 px one tab list.
import { ask, follow, footer, h, keepKeys, keyed, mark, problems, remark, say, set, tellShown, walkTabs } from "./common.mjs";
import { renderHotplug } from "./hotplug.mjs";
import { renderConsole } from "./console.mjs";
import { renderBuilder } from "./builder.mjs";

const WIDE_PX = 1200;
const PARTS = [["topology", "Topology"], ["hotplug", "Hot-plug"], ["console", "Consoles"]];

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
  tellShown(model, signal);

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
  follow(model, ["summary", "can_start", "question"], () => {
    say(summary, model.get("summary"));
    say(question, model.get("question"));
    start.disabled = !model.get("can_start");
    stop.disabled = !model.get("question");
    if (stop.disabled) dialog.hidden = true;
  }, signal);
  update();

  for (const [name, part, render] of [["topology", "builder", renderBuilder], ["hotplug", "hotplug", renderHotplug], ["console", "console", renderConsole]]) {
    const its = await model.widget_manager.get_model(model.get(part).replace("IPY_MODEL_", ""));
    render({ model: its, el: panels[name], signal });
  }
}

export default { render: renderDashboard };
