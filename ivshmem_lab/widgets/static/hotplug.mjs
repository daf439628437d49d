// Devices of running machines, in and out: the steps, the QMP messages, what the others see.
import { ask, clock, copyButton, follow, footer, h, keepKeys, keyed, mark, problems, remark, say, set, tellShown } from "./common.mjs";

/** Write the free places of a machine in one line: "27 of 30 slots free". */
export function freeWords(rows) {
  if (!rows) return "";
  const free = rows.filter(([, device]) => !device).length;
  return `${free} of ${rows.length} slots free`;
}

export function renderHotplug({ model, el, signal }) {
  let current = null;
  let asking = false;
  const id = `ivl-hotplug-${Math.random().toString(36).slice(2)}`;
  const select = (label, testid) => h("select", { class: "ivl-input", "aria-label": label, "data-testid": testid });

  const machine = select("Machine", "vm");
  const open = h("button", { type: "button", class: "ivl-button", "aria-expanded": "false", "aria-controls": `${id}-form`, "data-testid": "open" }, mark("plus"), "Plug…");
  const source = select("What the device shows", "source");
  const vectors = h("input", { class: "ivl-input ivl-number", type: "number", min: "1", max: "2048", "aria-label": "Vectors", placeholder: "auto" });
  const bus = select("Slot", "bus");
  const limit = h("input", { class: "ivl-input ivl-number", type: "number", min: "0.1", max: "3600", step: "any", value: "10", "aria-label": "Time limit for the guest, in seconds", "data-testid": "limit" });
  const plug = h("button", { class: "ivl-button ivl-primary", "data-testid": "plug" }, "Plug in");
  const field = (label, control) => h("label", { class: "ivl-field" }, h("span", {}, label), control);
  const form = h("form", { class: "ivl-form", id: `${id}-form`, hidden: true },
    field("Show", source), field("Vectors", vectors), field("Slot", bus), field("Wait, s", limit), plug);

  const nothing = h("p", { class: "ivl-empty" });
  const title = h("h4", { "data-testid": "title" });
  const begun = h("p", { class: "ivl-dim" });
  const steps = h("ol", { class: "ivl-steps", "data-testid": "steps" });
  const error = h("p", { class: "ivl-error", role: "alert", "data-testid": "error" });
  const back = h("p", { class: "ivl-dim" });
  const again = h("button", { type: "button", class: "ivl-button", "data-testid": "wait" }, "Wait again");
  const giveUp = h("button", { type: "button", class: "ivl-button", "data-testid": "give-up" }, "Give up");
  const force = h("button", { type: "button", class: "ivl-button ivl-warn", "data-testid": "force" }, "Force…");
  const question = h("p", { id: `${id}-question` });
  const yes = h("button", { type: "button", class: "ivl-button ivl-warn", "data-testid": "yes" }, "Reset the guest");
  const no = h("button", { type: "button", class: "ivl-button" }, "Keep waiting");
  const dialog = h("div", { class: "ivl-question", role: "alertdialog", "aria-labelledby": `${id}-question`, hidden: true, "data-testid": "question" }, question, h("div", { class: "ivl-row" }, no, yes));
  const actions = h("div", { class: "ivl-row" }, again, giveUp, force);
  const operation = h("div", {}, title, begun, steps, error, back, actions, dialog);

  const devices = h("ul", { class: "ivl-devices", "aria-label": "Devices", "data-testid": "devices" });
  const free = h("p", { class: "ivl-dim", "data-testid": "free" });
  const others = h("table", { class: "ivl-table", "data-testid": "others" }, h("caption", {}, "What the others see"), h("tbody"));
  const alone = h("p", { class: "ivl-dim" });
  const qmpHead = h("h4", {}, "QMP ");
  const qmpCount = h("span", { class: "ivl-dim" });
  qmpHead.append(qmpCount);
  const copyAll = copyButton("Copy all QMP messages", () => (view()?.qmp ?? []).map((each) => each.json).join("\n"));
  const qmp = h("div", { class: "ivl-qmp", "data-testid": "qmp" });
  const qmpBox = h("div", {}, h("div", { class: "ivl-row" }, qmpHead, h("span", { class: "ivl-space" }), copyAll), qmp);
  const left = h("div", {}, nothing, operation, h("h4", { class: "ivl-devices-head" }, "Devices"), devices, free);
  const right = h("div", { class: "ivl-right" }, others, alone, qmpBox);

  const problem = problems(model, signal);
  const root = h("section", { class: "ivl ivl-hotplug", "aria-label": "Hot-plug" },
    h("header", { class: "ivl-head" }, h("h3", {}, "Hot-plug"), machine, h("span", { class: "ivl-space" }), open),
    problem, form, h("div", { class: "ivl-columns" }, left, right), footer(model, signal));
  keepKeys(root);
  el.append(root);
  tellShown(model, signal);

  const vm = () => model.get("vms").find((each) => each.name === current);
  const view = () => model.get("operations")[current];
  const busy = () => ["working", "waiting", "silent"].includes(view()?.phase);

  async function intend(op, words, limitS = 0) {
    asking = true;
    update();
    try {
      await ask(model, op, { vm: current, ...words }, 30000 + limitS * 1000);
    } catch (failure) {
      problem.show(failure.message);
    }
    asking = false;
    update();
  }

  function options(control, rows) {
    keyed(control, rows, ([value]) => value, ([value, words]) => h("option", { value }, words), (option, [, words]) => say(option, words));
  }

  function drawSteps(now) {
    keyed(steps, now.stages, (stage) => stage.key, () => h("li", {}, mark("todo"), h("span", { class: "ivl-label" }), h("span", { class: "ivl-hidden" }), h("time"), h("progress", { max: "1", "aria-label": "Time that the guest has had" })),
      (row, stage) => {
        const [sign, label, word, time, bar] = row.children;
        remark(sign, stage.mark);
        say(label, stage.label);
        say(word, { done: ", done", now: ", now", todo: ", to come", failed: ", failed" }[stage.mark]);
        say(time, stage.time);
        const waits = stage.mark === "now" && now.waited_s !== null;
        bar.hidden = !waits;
        if (waits) bar.value = Math.min(1, now.waited_s / now.limit_s);
        set(row, { "data-mark": stage.mark, "data-stage": stage.key, "aria-current": stage.mark === "now" ? "step" : null });
      });
  }

  function drawOperation() {
    const now = view();
    operation.hidden = !now;
    qmpBox.hidden = !now;
    if (!now) return;
    set(operation, { "data-phase": now.phase, "data-testid": "operation" });
    say(title, now.title);
    say(begun, `${clock(now.begun_at_s)} · ${now.device_id ? `device ${now.device_id} · ` : ""}${now.phase}`);
    drawSteps(now);
    say(error, now.error);
    error.hidden = !now.error;
    say(back, now.way_back);
    back.hidden = !now.way_back;
    giveUp.hidden = !now.can_give_up;
    force.hidden = !now.can_force;
    again.hidden = !now.can_wait;
    actions.hidden = !now.can_give_up;
    if (!now.can_force) dialog.hidden = true;
    say(question, now.question);
    say(yes, `Reset ${now.vm}`);
    say(qmpCount, `${now.qmp.length} messages`);
    keyed(qmp, now.qmp.map((each, number) => ({ ...each, number })), (each) => `${now.begun_at_s}-${each.number}`,
      (each) => h("details", {}, h("summary", {}, h("span", { class: "ivl-dim" }, each.direction), h("code", {}, each.name), h("time", {}, each.at)), h("pre", { tabindex: "0", "aria-label": `${each.direction} ${each.name}` }, each.json)));
  }

  function drawOthers() {
    const now = view();
    const rows = model.get("others")[current] ?? [];
    others.hidden = !rows.length;
    keyed(others.tBodies[0], rows, (row) => row.peer_id, () => h("tr", {}, h("th", { scope: "row" }), h("td"), h("td", {}, mark("present"), h("span"))),
      (line, row) => {
        const [name, peer, state] = line.children;
        say(name, row.name);
        say(peer, `peer ${row.peer_id}`);
        remark(state.firstElementChild, row.mark);
        say(state.lastElementChild, row.words);
        set(line, { "data-mark": row.mark });
      });
    alone.hidden = !now || rows.length > 0;
    say(alone, !now ? "" : now.has_peers ? "Who hears of it is told when it has a peer id." : "A memory has no peers: nobody is told.");
  }

  function drawDevices() {
    const here = vm();
    keyed(devices, here?.devices ?? [], (device) => device.device_id,
      (device) => h("li", {}, h("span", { class: "ivl-label" }, h("b", {}, device.source), h("span", { class: "ivl-dim" })), h("button", { type: "button", class: "ivl-button", onclick: () => intend("unplug", { device_id: device.device_id, timeout_s: Number(limit.value) || 10 }, Number(limit.value) || 10) }, "Unplug")),
      (row, device) => {
        say(row.querySelector(".ivl-dim"), ` ${device.words}`);
        const button = row.lastElementChild;
        set(button, { "aria-label": `Unplug ${device.source} from ${here.name}`, "data-testid": `unplug-${device.device_id}`, title: device.fixed ? "It was there at the start, and a q35 lets go only of what was plugged into a root port" : null });
        button.disabled = device.fixed || !here.live || busy() || asking;
      });
    say(free, here?.live ? freeWords(model.get("slots")[current]) : "");
  }

  function update() {
    const vms = model.get("vms");
    const running = vms.filter((each) => each.live || model.get("operations")[each.name]);
    if (!running.some((each) => each.name === current)) current = running[0]?.name ?? null;
    options(machine, running.map((each) => [each.name, `${each.name} (${each.state})`]));
    machine.hidden = !running.length;
    if (current) machine.value = current;
    const here = vm();
    const sources = model.get("sources");
    options(source, sources.map((each) => [each.name, `${each.name} (${each.words})`]));
    const places = model.get("slots")[current] ?? [];
    options(bus, [["auto", "first free"], ...places.filter(([, device]) => !device).map(([place, , name]) => [JSON.stringify(name), place])]);
    const kind = sources.find((each) => each.name === source.value)?.kind;
    vectors.disabled = kind !== "server";
    open.disabled = !here?.live || !sources.length;
    if (open.disabled) show(false);
    plug.disabled = busy() || asking || !sources.length;
    const words = running.length ? (sources.length ? "" : "There is nothing to plug: make a server or a memory, lab.server(\"board\")") : "No running VM";
    say(nothing, words || (view() ? "" : "Nothing was plugged or unplugged from here yet."));
    nothing.hidden = !nothing.textContent;
    left.querySelector(".ivl-devices-head").hidden = !here?.devices.length;
    drawOperation();
    drawOthers();
    drawDevices();
    set(root, { "data-vm": current, "data-busy": String(busy() || asking) });
  }

  function show(shown) {
    form.hidden = !shown;
    set(open, { "aria-expanded": String(shown) });
  }

  machine.onchange = () => ((current = machine.value), update());
  source.onchange = update;
  open.onclick = () => {
    show(form.hidden);
    if (!form.hidden) source.focus();
  };
  form.onsubmit = (event) => {
    event.preventDefault();
    const limitS = Number(limit.value) || 10;
    const words = { source: source.value, timeout_s: limitS };
    if (vectors.value && !vectors.disabled) words.vectors = Number(vectors.value);
    if (bus.value && bus.value !== "auto") words.bus = JSON.parse(bus.value);
    intend("plug", words, limitS);
    show(false);
    open.focus();
  };
  form.onkeydown = (event) => {
    if (event.key === "Escape") (show(false), open.focus());
  };
  again.onclick = () => intend("wait", {}, view().limit_s);
  giveUp.onclick = () => intend("give_up", {});
  force.onclick = () => {
    dialog.hidden = false;
    no.focus();
  };
  no.onclick = () => {
    dialog.hidden = true;
    force.focus();
  };
  dialog.onkeydown = (event) => {
    if (event.key === "Escape") no.click();
  };
  yes.onclick = () => {
    dialog.hidden = true;
    machine.focus();
    intend("force", {}, view().limit_s);
  };
  follow(model, ["vms", "sources", "slots", "operations", "others"], update, signal);
}

export default { render: renderHotplug };
