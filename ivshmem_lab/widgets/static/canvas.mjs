// The canvas of the topology builder: nodes that are moved and connected by mouse and by keys. Local drags win over what comes in.
import { h, keyed, mark, remark, say, set } from "./common.mjs";

const GRID_PX = 8;
const CLICK_PX = 4;
const HEAD_PX = 60;
const DEVICE_PX = 28;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function drawn(tag, attributes = {}) {
  return set(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes);
}

const snapped = (px) => Math.max(0, Math.round(px / GRID_PX) * GRID_PX);

/** A point of a cubic Bézier curve with level ends. */
function along({ x1, y1, x2, y2 }, at) {
  const middle = (x1 + x2) / 2;
  const rest = 1 - at;
  const one = (a, b, c, d) => rest ** 3 * a + 3 * rest ** 2 * at * b + 3 * rest * at ** 2 * c + at ** 3 * d;
  return [one(x1, middle, middle, x2), one(y1, y1, y2, y2)];
}

const vectorsOf = ({ vectors }) => (vectors ? ` · ${vectors} vector${vectors === 1 ? "" : "s"}` : "");
const BADGE_PLACES = [0.36, 0.5, 0.64, 0.24];

/** Where the badges of links stand: near the device, where the links of one machine are still apart, but not on another badge. */
function badgePlaces(links) {
  const taken = [];
  return links.map((link) => {
    const rows = link.words.split("\n");
    const width = 6.2 * Math.max(...rows.map((row) => row.length)) + 18;
    const height = 18 * rows.length + 4;
    const free = ([x, y]) => taken.every((each) => Math.abs(each.x - x) >= (each.width + width) / 2 || Math.abs(each.y - y) >= (each.height + height) / 2);
    const spots = BADGE_PLACES.map((at) => along(link, at));
    const [x, y] = spots.find(free) ?? spots[0];
    taken.push({ x, y, width, height });
    return [x, y];
  });
}

const curve = (x1, y1, x2, y2) => `M${x1} ${y1}C${(x1 + x2) / 2} ${y1} ${(x1 + x2) / 2} ${y2} ${x2} ${y2}`;

/**
 * Make a canvas.
 *
 * `intend(op, words)` asks Python and rejects with its reason; `onSelect(names, device)` tells what is selected; `onInspect()`,
 * `onDelete(names, device)`, `onLog(name)` and `onText(text)` are what keys, buttons and pastes ask for.
 */
export function makeCanvas({ intend, onSelect, onInspect, onDelete, onLog, onText, signal }) {
  let drawing = { nodes: [], words: {}, rates: {} };
  let scale = 1;
  let pan = [0, 0];
  let selected = new Set();
  let device = null; // number of a device row of the one selected machine
  let connecting = null; // {source, targets, order, at, point}
  let touched = false;
  const held = new Map(); // name: place while it is dragged, until Python has it

  const lines = drawn("svg", { class: "ivl-wires", "aria-hidden": "true" });
  const wires = drawn("g");
  const pulses = drawn("g");
  const rubber = drawn("path", { class: "ivl-rubber" });
  lines.append(wires, pulses, rubber);
  const boxes = h("div", { class: "ivl-nodes" });
  const badges = h("ul", { class: "ivl-badges", "aria-label": "Links" });
  const band = h("div", { class: "ivl-band", hidden: true });
  const stage = h("div", { class: "ivl-sheet" }, lines, badges, boxes, band);
  const empty = h("p", { class: "ivl-empty" }, "Drag something here from the left, press + beside it, or paste a QEMU command line. In Python: ", h("code", {}, 'lab.server("board", size="4M", vectors=2)'));
  const hint = h("p", { class: "ivl-hint", role: "status", "data-testid": "hint" });
  const canvas = h("div", { class: "ivl-board", role: "group", "aria-label": "Topology", "data-testid": "canvas", tabindex: "0" }, stage, empty, hint);

  const nodeOf = (name) => drawing.nodes.find((node) => node.name === name);
  const placeOf = (node) => held.get(node.name) ?? { x: node.x, y: node.y };
  const main = (name) => boxes.querySelector(`[data-key="${CSS.escape(name)}"] .ivl-bnode-main`);

  /** Where on the sheet a point of the window is. */
  function toSheet(clientX, clientY) {
    const box = canvas.getBoundingClientRect();
    return [(clientX - box.left - pan[0]) / scale, (clientY - box.top - pan[1]) / scale];
  }

  const contains = (x, y) => {
    const box = canvas.getBoundingClientRect();
    return x >= box.left && x <= box.right && y >= box.top && y <= box.bottom;
  };

  // -- drawing -------------------------------------------------------------------------------------

  function links() {
    const found = [];
    for (const node of drawing.nodes) {
      node.devices.forEach((each, number) => found.push({ key: `${node.name}-${number}`, from: node, row: number, to: nodeOf(each.target), vectors: each.vectors, isNew: each.new || node.draft === "draft" }));
      if (node.server) found.push({ key: node.name, from: node, row: null, to: nodeOf(node.server), vectors: node.vectors, isNew: node.draft !== "" });
    }
    return found.filter((link) => link.to).map((link) => ({ ...link, ...ends(link) }));
  }

  function ends({ from, row, to }) {
    const [a, b] = [placeOf(from), placeOf(to)];
    const left = a.x < b.x;
    const x1 = left ? a.x + from.width : a.x;
    const x2 = left ? b.x : b.x + to.width;
    return { x1, y1: a.y + (row === null ? from.height / 2 : HEAD_PX + DEVICE_PX * row + 10), x2, y2: b.y + to.height / 2 };
  }

  function wordsOf(link) {
    if (link.isNew) return `new${vectorsOf(link)}`;
    const words = drawing.words[link.key] || "linked";
    const rate = drawing.rates[link.key];
    // Who has not joined has no vectors, and the badge its room.
    return words + (words === "not joined" ? "" : vectorsOf(link)) + (rate ? `\n${rate.words}` : "");
  }

  function drawLinks() {
    const found = links().map((link) => ({ ...link, words: wordsOf(link) }));
    const places = badgePlaces(found);
    keyed(wires, found, (link) => link.key, () => drawn("path"), (path, link) => set(path, { d: curve(link.x1, link.y1, link.x2, link.y2), class: link.isNew ? "ivl-new" : drawing.rates[link.key] ? "ivl-live" : "" }));
    drawPulses(found);
    keyed(badges, found.map((link, at) => ({ ...link, place: places[at] })), (link) => link.key, () => h("li", { class: "ivl-badge" }), (badge, link) => {
      say(badge, link.words);
      set(badge, { "aria-label": `${link.from.name} to ${link.to.name}: ${link.words}`, class: link.isNew ? "ivl-badge ivl-new" : "ivl-badge" });
      [badge.style.left, badge.style.top] = link.place.map((each) => `${each}px`);
    });
  }

  /** Arrows that go along a link while interrupts do: their size is the amount, in tens. */
  function drawPulses(found) {
    const ways = found.flatMap((link) => {
      const rate = drawing.rates[link.key];
      if (!rate) return [];
      return [["sent", false], ["come", true]].filter(([way]) => rate[way] > 0).map(([way, back]) => ({ link, back, key: `${link.key}-${way}`, size: Math.min(9, 3 + Math.log10(1 + rate[way])) }));
    });
    keyed(pulses, ways, (way) => way.key, () => drawn("path", { class: "ivl-pulse" }), (path, { link, back, size }) => {
      set(path, { d: `M${-size} ${-size / 1.5}L${size} 0L${-size} ${size / 1.5}Z`, "data-back": back ? "true" : null });
      const way = back ? curve(link.x2, link.y2, link.x1, link.y1) : curve(link.x1, link.y1, link.x2, link.y2);
      if (path.dataset.way !== way) {
        path.dataset.way = way; // set only when it changes: the arrow would begin anew
        path.style.offsetPath = `path("${way}")`;
      }
    });
  }

  function makeNode(node) {
    const name = node.name;
    const body = h("button", { type: "button", class: "ivl-bnode-main" },
      h("span", { class: "ivl-node-head" }, h("b"), h("span", { class: "ivl-dim" })),
      h("span", { class: "ivl-node-state" }, mark("defined"), h("span")));
    const port = h("button", { type: "button", class: "ivl-port", "aria-label": `Connect ${name}`, title: "Drag to connect, or press c" });
    const log = h("button", { type: "button", class: "ivl-button ivl-log", onclick: () => onLog(name) }, "Show log");
    const box = h("div", { class: "ivl-bnode", role: "group", "aria-label": name, "data-testid": `node-${name}` }, body, h("div", { class: "ivl-rows" }), port, log);
    body.onpointerdown = (event) => startMove(event, name);
    body.onclick = (event) => event.detail === 0 && select([name], null, event.shiftKey); // by keys; the mouse is startMove's
    body.ondblclick = () => onInspect();
    port.onpointerdown = (event) => startLine(event, name);
    port.onclick = (event) => event.detail === 0 && connect(name);
    return box;
  }

  function patchNode(box, node) {
    const [body, rows, port, log] = box.children;
    const { x, y } = placeOf(node);
    box.style.transform = `translate(${x}px, ${y}px)`;
    box.style.width = `${node.width}px`;
    box.style.height = `${node.height}px`;
    const [head, state] = body.children;
    say(head.firstElementChild, node.name);
    say(head.lastElementChild, node.kind);
    remark(state.firstElementChild, node.mark);
    say(state.lastElementChild, node.words + (node.draft === "changed" ? " · changed" : ""));
    const isSelected = selected.has(node.name);
    set(body, { "aria-label": node.label + (node.draft === "changed" ? ", changed in the draft" : ""), "aria-pressed": String(isSelected && device === null), title: node.words });
    keyed(rows, node.devices.map((each, number) => ({ ...each, number })), (each) => each.number, (each) => {
      const row = h("button", { type: "button", class: "ivl-device" }, h("span"), h("span", { class: "ivl-dim" }));
      row.onclick = () => select([node.name], each.number);
      return row;
    }, (row, each) => {
      say(row.firstElementChild, each.target);
      say(row.lastElementChild, each.new ? "new" : drawing.words[`${node.name}-${each.number}`] || "");
      set(row, { "aria-label": `Device of ${node.name} at ${each.target}`, "aria-pressed": String(isSelected && device === each.number), "data-testid": `device-${node.name}-${each.number}` });
    });
    const target = connecting?.targets?.[node.name];
    const pick = connecting?.order?.[connecting.at] === node.name;
    set(box, { "data-state": node.mark, "data-draft": node.draft, "data-selected": String(isSelected), "data-wrong": node.wrong ? "true" : null, title: node.wrong || null,
      "data-target": target ? (target.reason ? "no" : "yes") : null, "data-pick": pick ? "true" : null });
    port.hidden = false;
    log.hidden = node.mark !== "failed";
  }

  function draw() {
    const focused = boxes.contains(document.activeElement) ? document.activeElement : null;
    const order = [...drawing.nodes].sort((a, b) => Math.round(a.y / 48) - Math.round(b.y / 48) || a.x - b.x);
    keyed(boxes, order, (node) => node.name, makeNode, patchNode);
    if (focused?.isConnected && document.activeElement !== focused) focused.focus({ preventScroll: true }); // it was moved in the document
    drawLinks();
    empty.hidden = drawing.nodes.length > 0;
    stage.style.transform = `translate(${pan[0]}px, ${pan[1]}px) scale(${scale})`;
    if (connecting?.point) {
      const source = nodeOf(connecting.source);
      const place = source && placeOf(source);
      if (source) set(rubber, { d: curve(place.x + source.width, place.y + HEAD_PX / 2, ...connecting.point) });
    } else set(rubber, { d: "" });
  }

  // -- looking ---------------------------------------------------------------------------------------

  function fit() {
    const right = Math.max(240, ...drawing.nodes.map((node) => placeOf(node).x + node.width)) + 24;
    const bottom = Math.max(120, ...drawing.nodes.map((node) => placeOf(node).y + node.height)) + 24;
    scale = Math.max(0.3, Math.min(1, (canvas.clientWidth || right) / right, (canvas.clientHeight || bottom) / bottom));
    pan = [scale < 1 ? Math.max(0, ((canvas.clientWidth || right) - right * scale) / 2) : 0, 0];
    draw();
    return scale;
  }

  function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
    const before = scale;
    scale = Math.max(0.3, Math.min(2, scale * factor));
    pan = [x - ((x - pan[0]) * scale) / before, y - ((y - pan[1]) * scale) / before];
    touched = true;
    draw();
    return scale;
  }

  function select(names, number = null, more = false) {
    if (!more) selected = new Set(names);
    else for (const name of names) if (!selected.delete(name)) selected.add(name);
    device = selected.size === 1 ? number : null;
    onSelect([...selected], device);
    draw();
  }

  // -- moving ----------------------------------------------------------------------------------------

  /** Follow the pointer until it is lifted; `end(moved, event)` hears how it ended. */
  function followPointer(event, move, end) {
    const from = [event.clientX, event.clientY];
    let moved = false;
    const onMove = (now) => {
      moved ||= Math.hypot(now.clientX - from[0], now.clientY - from[1]) > CLICK_PX;
      if (moved) move(now, [(now.clientX - from[0]) / scale, (now.clientY - from[1]) / scale]);
    };
    const onEnd = (now) => {
      window.removeEventListener("pointermove", onMove);
      window.removeEventListener("pointerup", onEnd);
      window.removeEventListener("pointercancel", onEnd);
      end(moved && now.type !== "pointercancel", now);
    };
    window.addEventListener("pointermove", onMove);
    window.addEventListener("pointerup", onEnd);
    window.addEventListener("pointercancel", onEnd);
  }

  async function place(names) {
    const places = Object.fromEntries(names.filter((name) => held.has(name)).map((name) => [name, [held.get(name).x, held.get(name).y]]));
    const mine = names.map((name) => held.get(name));
    try {
      await intend("move", { places });
    } finally {
      names.forEach((name, number) => held.get(name) === mine[number] && held.delete(name)); // not one that is dragged again
      draw();
    }
  }

  function startMove(event, name) {
    if (event.button !== 0) return;
    if (connecting) return finish(name);
    if (event.shiftKey || !selected.has(name)) select([name], null, event.shiftKey);
    else if (device !== null) select([name]);
    const names = selected.has(name) ? [...selected] : [name];
    const before = names.map((each) => placeOf(nodeOf(each)));
    followPointer(event, (_, [dx, dy]) => {
      names.forEach((each, number) => held.set(each, { x: snapped(before[number].x + dx), y: snapped(before[number].y + dy) }));
      draw();
    }, (moved) => {
      if (moved) place(names);
      else if (!event.shiftKey && names.length > 1) select([name]);
    });
  }

  canvas.onpointerdown = (event) => {
    if (event.button !== 0 || event.target.closest(".ivl-bnode, .ivl-hint")) return;
    if (connecting) cancel();
    const start = toSheet(event.clientX, event.clientY);
    const before = pan;
    if (!event.shiftKey) select([]);
    followPointer(event, (now, [dx, dy]) => {
      if (!event.shiftKey) {
        pan = [before[0] + dx * scale, before[1] + dy * scale];
        touched = true;
      } else {
        const end = toSheet(now.clientX, now.clientY);
        const [x, y] = [Math.min(start[0], end[0]), Math.min(start[1], end[1])];
        const [width, height] = [Math.abs(start[0] - end[0]), Math.abs(start[1] - end[1])];
        Object.assign(band.style, { left: `${x}px`, top: `${y}px`, width: `${width}px`, height: `${height}px` });
        band.hidden = false;
        selected = new Set(drawing.nodes.filter((node) => {
          const at = placeOf(node);
          return at.x < x + width && x < at.x + node.width && at.y < y + height && y < at.y + node.height;
        }).map((node) => node.name));
      }
      draw();
    }, () => {
      band.hidden = true;
      if (event.shiftKey) select([...selected]);
    });
  };
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return; // the notebook scrolls
    event.preventDefault();
    const box = canvas.getBoundingClientRect();
    zoom(event.deltaY < 0 ? 1.1 : 1 / 1.1, event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });

  // -- connecting ------------------------------------------------------------------------------------

  async function connect(source, point = null) {
    const mine = { source, targets: null, order: [], at: 0, point };
    connecting = mine;
    draw();
    try {
      mine.targets = await intend("targets", { source });
    } catch {
      cancel();
      return mine;
    }
    if (connecting !== mine) return mine;
    const byPlace = drawing.nodes.filter((node) => mine.targets[node.name]).sort((a, b) => a.y - b.y || a.x - b.x).map((node) => node.name);
    mine.order = byPlace.filter((name) => !mine.targets[name].reason);
    if (!point) {
      if (mine.order.length) tell();
      else {
        const reason = byPlace.length ? mine.targets[byPlace[0]].reason : `there is nothing else to connect ${source} with: add a server or a memory`;
        cancel(reason);
      }
    }
    draw();
    return mine;
  }

  function tell() {
    const name = connecting.order[connecting.at];
    say(hint, `${name}: ${connecting.targets[name].what} (${connecting.at + 1} of ${connecting.order.length}). Enter connects, arrows choose another, Esc cancels.`);
  }

  function cancel(words = "") {
    connecting = null;
    say(hint, words);
    draw();
  }

  async function finish(name) {
    const mine = connecting;
    const target = mine?.targets?.[name];
    if (!target) return cancel();
    cancel(target.reason);
    if (!target.reason) await intend("connect", { source: mine.source, target: name }).catch(() => {});
    main(mine.source)?.focus();
  }

  function startLine(event, name) {
    if (event.button !== 0) return;
    event.stopPropagation();
    const asked = connect(name, toSheet(event.clientX, event.clientY));
    let last = event;
    const nodeUnder = (now) => document.elementFromPoint(now.clientX, now.clientY)?.closest?.(".ivl-bnode")?.dataset.key;
    const explain = () => {
      const target = connecting?.point && connecting.targets?.[nodeUnder(last)];
      if (connecting?.point) say(hint, target ? target.reason || target.what : "");
    };
    asked.then(explain);
    followPointer(event, (now) => {
      last = now;
      if (!connecting) return;
      connecting.point = toSheet(now.clientX, now.clientY);
      explain();
      draw();
    }, async (moved, now) => {
      const mine = await asked;
      if (connecting !== mine) return;
      mine.point = null;
      if (!moved) {
        if (mine.order.length) tell();
        else cancel(Object.values(mine.targets ?? {})[0]?.reason ?? "there is nothing to connect with");
        return draw();
      }
      const over = nodeUnder(now);
      if (over && mine.targets?.[over]) finish(over);
      else cancel();
    });
  }

  // -- keys --------------------------------------------------------------------------------------------

  canvas.addEventListener("keydown", (event) => {
    const key = event.key;
    const take = (action) => {
      event.preventDefault();
      action();
    };
    if (connecting) {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[key];
      if (step && connecting.order.length) return take(() => {
        connecting.at = (connecting.at + step + connecting.order.length) % connecting.order.length;
        tell();
        draw();
      });
      if (key === "Enter") return take(() => finish(connecting.order[connecting.at]));
      if (key === "Escape") return take(() => cancel());
    }
    if (event.ctrlKey || event.metaKey) {
      if (key.toLowerCase() === "z") return take(() => intend(event.shiftKey ? "redo" : "undo"));
      if (key.toLowerCase() === "y") return take(() => intend("redo"));
      if (key.toLowerCase() === "a") return take(() => select(drawing.nodes.map((node) => node.name)));
      return;
    }
    const name = event.target.closest?.(".ivl-bnode")?.dataset.key;
    if (key === "f") return take(() => ((touched = false), fit()));
    if (key === "+" || key === "-") return take(() => zoom(key === "+" ? 1.2 : 1 / 1.2));
    if (key === "Escape") return take(() => (select([]), say(hint, "")));
    if (!name) return;
    const isRow = event.target.classList.contains("ivl-device");
    if (key === "c") return take(() => connect(name));
    if (key === "Delete" || key === "Backspace") return take(() => {
      if (!selected.has(name)) select([name], isRow ? Number(event.target.dataset.key) : null);
      onDelete([...selected], device);
    });
    if (isRow) return;
    if (key === "Enter") return take(() => (selected.has(name) || select([name]), onInspect()));
    if (key === " ") return take(() => intend("toggle", { name }).catch(() => {}));
    const arrow = ARROWS[key];
    if (arrow) take(() => {
      const names = selected.has(name) ? [...selected] : [name];
      const by = event.shiftKey ? 1 : GRID_PX;
      for (const each of names) {
        const at = placeOf(nodeOf(each));
        held.set(each, { x: Math.max(0, at.x + arrow[0] * by), y: Math.max(0, at.y + arrow[1] * by) });
      }
      draw();
      place(names);
    });
  });
  canvas.addEventListener("paste", (event) => {
    const text = event.clipboardData?.getData("text");
    if (!text?.trim()) return;
    event.preventDefault();
    onText(text);
  });

  const sizes = new ResizeObserver(() => touched || fit());
  sizes.observe(canvas);
  signal?.addEventListener("abort", () => sizes.disconnect());

  return {
    element: canvas,
    fit: () => ((touched = false), fit()),
    zoom,
    contains,
    toSheet,
    select,
    focus: (name) => main(name)?.focus(),
    scale: () => scale,
    update(next) {
      const first = !drawing.nodes.length && next.nodes.length > 0;
      drawing = next;
      const there = new Set(next.nodes.map((node) => node.name));
      const kept = [...selected].filter((name) => there.has(name));
      if (kept.length !== selected.size) select(kept);
      // What was dropped stays under the pointer; only what would be out of sight moves the view.
      const outside = drawing.nodes.some((node) => node.x * scale + pan[0] + 40 > canvas.clientWidth || (node.y + node.height) * scale + pan[1] > canvas.clientHeight);
      if ((first || outside) && !touched && !held.size && canvas.clientWidth) fit();
      else draw();
    },
  };
}

export default {};
