// What the front ends share. anywidget loads one file: this one is put in front of each of them.

const SVG = "http://www.w3.org/2000/svg";
const ANSWER_LIMIT_MS = 15000;

/** Make an element: h("button", {class: "x", onclick: f, "aria-label": "…"}, "text", child). Texts are never markup. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  set(element, attributes);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Set what differs; functions become listeners, null takes an attribute away. */
export function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element[name] = value;
    else if (value === null || value === undefined || value === false) element.removeAttribute(name);
    else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value === true ? "" : value);
  }
  return element;
}

/** Set a text if it differs, so that selections and screen readers are left alone. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Bring the children of an element in line with items, by key: existing ones are patched, never rebuilt. */
export function keyed(parent, items, keyOf, make, patch) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let before = parent.firstElementChild;
  for (const item of items) {
    const key = String(keyOf(item));
    let child = old.get(key);
    if (child) old.delete(key);
    else {
      child = make(item);
      child.dataset.key = key;
    }
    patch?.(child, item);
    if (child === before) before = before.nextElementSibling;
    else parent.insertBefore(child, before);
  }
  for (const child of old.values()) child.remove();
}

const SHAPES = {
  running: '<path d="M4 2.5v11l9-5.5z" fill="currentColor"/>',
  paused: '<path d="M4 3h3v10H4zM9 3h3v10H9z" fill="currentColor"/>',
  stopped: '<path d="M4 4h8v8H4z" fill="currentColor"/>',
  failed: '<path d="M4 4l8 8M12 4l-8 8" stroke="currentColor" stroke-width="2.4" fill="none"/>',
  defined: '<circle cx="8" cy="8" r="5" fill="none" stroke="currentColor" stroke-width="1.6"/>',
  starting: '<path d="M8 3a5 5 0 1 1-5 5" fill="none" stroke="currentColor" stroke-width="2"/>',
  done: '<circle cx="8" cy="8" r="6.4" fill="none" stroke="currentColor" stroke-width="1.4"/><path d="M5 8.2l2.2 2.2L11.2 6" fill="none" stroke="currentColor" stroke-width="1.6"/>',
  now: '<circle cx="8" cy="8" r="5" fill="none" stroke="currentColor" stroke-width="4"/>',
  todo: '<circle cx="8" cy="8" r="6.4" fill="none" stroke="currentColor" stroke-width="1.4" stroke-dasharray="2.4 2"/>',
  present: '<path d="M3 8.5l3.4 3.4L13 5" fill="none" stroke="currentColor" stroke-width="1.8"/>',
  self: '<circle cx="8" cy="8" r="2.5" fill="currentColor"/>',
  absent: '<path d="M3 8h10" stroke="currentColor" stroke-width="1.8"/>',
  pending: '<circle cx="4" cy="8" r="1.3" fill="currentColor"/><circle cx="8" cy="8" r="1.3" fill="currentColor"/><circle cx="12" cy="8" r="1.3" fill="currentColor"/>',
  withheld: '<path d="M8 1.8l5 1.8v4c0 3.2-2 5.4-5 6.6-3-1.2-5-3.4-5-6.6v-4z" fill="none" stroke="currentColor" stroke-width="1.5"/>',
  plus: '<path d="M8 3v10M3 8h10" stroke="currentColor" stroke-width="1.6"/>',
  copy: '<path d="M5.5 5.5h8v8h-8zM10.500 5.500v-3h-8v8h3" fill="none" stroke="currentColor" stroke-width="1.3"/>',
};

/** A mark of 16 x 16; the word for it stands beside it, so it is hidden from screen readers. */
export function mark(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("class", `ivl-mark ivl-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.innerHTML = SHAPES[name] ?? SHAPES.defined; // the shapes are ours
  svg.dataset.mark = name;
  return svg;
}

/** Change a mark in its place. */
export function remark(svg, name) {
  if (svg.dataset.mark !== name) svg.replaceWith(mark(name));
}

/** Follow traits of a model until `signal` says that the view is gone. */
export function follow(model, names, update, signal) {
  for (const name of names) {
    model.on(`change:${name}`, update);
    signal?.addEventListener("abort", () => model.off(`change:${name}`, update));
  }
  update();
}

let requests = 0;

/** Ask Python to do something; the promise ends with its answer, or with what went wrong. */
export function ask(model, op, words = {}, limitMs = ANSWER_LIMIT_MS) {
  const req = `${Date.now().toString(36)}-${(requests += 1)}`;
  return new Promise((resolve, reject) => {
    const end = (finish, value) => {
      clearTimeout(timer);
      model.off("msg:custom", hear);
      finish(value);
    };
    const hear = (message) => {
      if (message?.type !== "answer" || message.req !== req) return;
      if (message.ok) end(resolve, message.result);
      else end(reject, new Error(message.error));
    };
    const timer = setTimeout(
      () => end(reject, new Error(`no answer from Python in ${limitMs / 1000} s; is the kernel busy or gone?`)),
      limitMs,
    );
    model.on("msg:custom", hear);
    model.send({ op, req, ...words });
  });
}

/** Tell Python that a window shows the widget, and when it does no more: what nobody sees is looked after less often. */
export function tellShown(model, signal) {
  const tell = (op) => {
    try {
      model.send({ op });
    } catch {
      // The kernel or its widget is gone, and with it who would look.
    }
  };
  tell("shown");
  signal?.addEventListener("abort", () => tell("hidden"));
}

/** Put a text on the clipboard, also where the page may not use the clipboard's interface. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { "aria-hidden": "true", style: "position:fixed;opacity:0" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

/** A button that copies what a function returns, and says so. */
export function copyButton(label, textOf) {
  const button = h("button", { type: "button", class: "ivl-icon", "aria-label": label, title: label }, mark("copy"));
  button.onclick = async () => {
    await copy(textOf());
    button.title = "copied";
    button.classList.add("ivl-copied");
    setTimeout(() => {
      button.classList.remove("ivl-copied");
      button.title = label;
    }, 1200);
  };
  return button;
}

/** The last line of a widget: Python's line of what was done last, and how things stand. */
export function footer(model, signal) {
  const code = h("code", { "data-testid": "python", tabindex: "0" }); // many lines scroll
  const status = h("span", { class: "ivl-status", role: "status", "data-testid": "status" });
  const button = copyButton("Copy the Python line", () => model.get("python"));
  const element = h("footer", { class: "ivl-footer" }, h("span", { class: "ivl-dim" }, "Python"), code, button, status);
  follow(model, ["python", "status"], () => {
    say(code, model.get("python") || "–");
    button.hidden = !model.get("python");
    // Seconds that count up are no news: only a sentence with other words is announced.
    const sentence = model.get("status");
    const words = sentence.replace(/[\d.]+ of/, "");
    status.setAttribute("aria-live", status.dataset.words === words ? "off" : "polite");
    status.dataset.words = words;
    say(status, sentence);
  }, signal);
  return element;
}

/** A bar for what went wrong; errors of this page go there, too. */
export function problems(model, signal) {
  const text = h("span");
  const close = h("button", { type: "button", class: "ivl-button" }, "Dismiss");
  const bar = h("div", { class: "ivl-problem", role: "alert", "data-testid": "problem", hidden: true }, mark("failed"), text, close);
  const show = (message) => {
    say(text, message);
    bar.hidden = !message;
  };
  close.onclick = () => show("");
  follow(model, ["problem"], () => show(model.get("problem")), signal);
  bar.show = show;
  return bar;
}

/** Keep keys that a widget uses from reaching JupyterLab's command mode. */
export function keepKeys(element) {
  element.addEventListener("keydown", (event) => event.stopPropagation());
}

/** Let arrows, Home and End walk the tabs of a list that is one stop. */
export function walkTabs(list, choose) {
  list.addEventListener("keydown", (event) => {
    const tabs = [...list.querySelectorAll('[role="tab"]')];
    const at = tabs.indexOf(document.activeElement);
    const step = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (step === undefined || at < 0) return;
    event.preventDefault();
    const tab = tabs[(step + tabs.length) % tabs.length];
    choose(tab.dataset.key);
    tab.focus();
  });
}

/** The time of day of a moment in seconds, to the millisecond. */
export function clock(seconds) {
  const date = new Date(seconds * 1000);
  return `${date.toLocaleTimeString("en-GB")}.${String(date.getMilliseconds()).padStart(3, "0")}`;
}
