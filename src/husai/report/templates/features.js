"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const { columns, statements, tones, meanings, names, about, peers, contexts } = data;
const n = columns.feature.length;
const ROW = 36; // height of a row in px, as in the style sheet
const MARGIN = 12; // rows beyond the window that are drawn too
const $ = (id) => document.getElementById(id);

// How a value is written.
const PER_CENT = new Set(["firing_rate"]);
const PLAIN = new Set(["feature", "recurs", "siblings", "rebuilt", "nearest_partner"]);
const BOOLEAN = new Set(["certified", "above_chance", "dead", "dense"]);
function written(name, i) {
  const value = columns[name][i];
  if (value === null) return "–";
  if (name === "statement") return statements[value];
  if (name === "recurs") return `${value} of ${columns.siblings[i]}`;
  if (name === "prototype") return JSON.stringify(value).slice(1, -1);
  if (BOOLEAN.has(name)) return value ? "yes" : "no";
  if (typeof value === "string") return value;
  if (PLAIN.has(name)) return String(value);
  if (PER_CENT.has(name)) return `${Number((100 * value).toPrecision(3))} %`;
  const small = value !== 0 && Math.abs(value) < 0.001;
  return (small ? value.toExponential(1) : value.toFixed(3)).replace(/^-/, "−");
}

// What a search reads, once for each feature.
const words = columns.feature.map((feature, i) => {
  const found = contexts[feature];
  const read = found ? found.contexts.map((c) => c.text.join("")).join("\n") : "";
  return `${feature} ${columns.prototype[i] ?? ""} ${columns.nearest_sibling[i] ?? ""} ${read}`.toLowerCase();
});

// ---------------------------------------------------------------------------------------------------------------------
// Which rows, in which order

let order = Array.from({ length: n }, (_, i) => i);
let sorting = { name: "recurs", down: true };

function select() {
  const wanted = $("search").value.trim().toLowerCase();
  const least = Number($("least").value) || 0;
  const only = $("with").checked;
  const on = new Set([...document.querySelectorAll("[name=statement]:checked")].map((box) => box.dataset.name));
  const shown = statements.map((name) => on.has(name));
  const number = /^\d+$/.test(wanted) ? Number(wanted) : null;
  order = [];
  for (let i = 0; i < n; i += 1) {
    if (!shown[columns.statement[i]] || columns.recurs[i] < least) continue;
    if (only && !(columns.feature[i] in contexts)) continue;
    if (number !== null ? columns.feature[i] !== number : !words[i].includes(wanted)) continue;
    order.push(i);
  }
  arrange();
}

function arrange() {
  const { name, down } = sorting;
  const column = columns[name];
  const sign = down ? -1 : 1;
  const text = column.some((value) => typeof value === "string");
  const compare = text ? (a, b) => (a < b ? -1 : a > b ? 1 : 0) : (a, b) => a - b;
  order.sort((i, j) => {
    const a = column[i], b = column[j];
    if (a === null || b === null) return (a === null) - (b === null) || i - j; // no value: last, both ways
    return sign * compare(a, b) || columns.q_value[i] - columns.q_value[j] || i - j;
  });
  for (const head of $("rows").tHead.rows[0].cells) {
    const sorted = head.dataset.name === name;
    if (sorted) head.setAttribute("aria-sort", down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
  $("sort").value = name;
  $("turn").textContent = down ? "↓" : "↑";
  $("count").textContent = `${order.length.toLocaleString("en")} of ${n.toLocaleString("en")}`;
  draw(true);
}

function sortBy(name, down) {
  sorting = { name, down };
  arrange();
}

// ---------------------------------------------------------------------------------------------------------------------
// The rows in sight

const table = $("rows");
const body = table.tBodies[0];
const shownColumns = [...Object.keys(names), "preview"];
let drawn = [0, 0];

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function badge(i) {
  const statement = columns.statement[i];
  const tone = tones[statement];
  const made = element("span", `badge ${tone}`);
  const mark = element("span", "", { pass: "✓", waived: "!", some: "~", missing: "○" }[tone]);
  mark.setAttribute("aria-hidden", "true");
  made.append(mark, ` ${statements[statement]}`);
  made.title = meanings[statements[statement]];
  return made;
}

const visible = (text) => text.replaceAll("\r", "").replaceAll("\n", "↵ ");

function pieces(context, from = 0, to = context.text.length) {
  const top = Math.max(...context.values, 0) || 1;
  return context.text.slice(from, to).map((text, at) => {
    const value = context.values[from + at];
    if (value <= 0) return document.createTextNode(visible(text));
    const made = element("mark", `s${1 + Math.min(3, Math.floor((4 * value) / top))}`, visible(text));
    made.title = String(value);
    return made;
  });
}

function preview(i) {
  const found = contexts[columns.feature[i]];
  if (!found || !found.contexts.length) return [];
  const context = found.contexts[0];
  const peak = context.values.indexOf(Math.max(...context.values));
  return pieces(context, Math.max(0, peak - 2), Math.min(context.text.length, peak + 8));
}

function row(at) {
  const i = order[at];
  const made = element("tr");
  made.dataset.at = at;
  made.setAttribute("aria-rowindex", at + 2);
  for (const name of shownColumns) {
    const cell = element("td", `c-${name}`);
    if (name === "feature") {
      const open = element("button", "open", String(columns.feature[i]));
      open.type = "button";
      open.setAttribute("aria-label", `Feature ${columns.feature[i]}: open`);
      cell.append(open);
    } else if (name === "statement") cell.append(badge(i));
    else if (name === "preview") {
      cell.classList.add("text");
      cell.append(...preview(i));
    } else {
      cell.textContent = written(name, i);
      if (name !== "prototype") cell.classList.add("figure");
    }
    made.append(cell);
  }
  return made;
}

function space(rows) {
  const made = element("tr", "space");
  made.setAttribute("aria-hidden", "true");
  const cell = element("td");
  cell.colSpan = shownColumns.length;
  cell.style.height = `${rows * ROW}px`;
  made.append(cell);
  return made;
}

function draw(anew = false, all = 0) {
  const above = -body.getBoundingClientRect().top;
  const first = Math.max(0, Math.min(order.length, Math.floor(above / ROW) - MARGIN));
  const last = Math.min(order.length, Math.max(0, Math.ceil((above + innerHeight) / ROW)) + MARGIN);
  const [from, to] = all ? [0, Math.min(all, order.length)] : [first, last];
  if (!anew && from === drawn[0] && to === drawn[1]) return;
  const focused = document.activeElement?.closest?.("tr")?.dataset.at;
  drawn = [from, to];
  const rows = [];
  if (from) rows.push(space(from));
  for (let at = from; at < to; at += 1) rows.push(row(at));
  if (to < order.length && !all) rows.push(space(order.length - to));
  if (!order.length) {
    const none = element("tr", "space");
    const cell = element("td", "none", "No feature matches.");
    cell.colSpan = shownColumns.length;
    none.append(cell);
    rows.push(none);
  }
  body.replaceChildren(...rows);
  table.setAttribute("aria-rowcount", order.length + 1);
  if (focused !== undefined && !anew) focusOn(Number(focused));
}

function focusOn(at) {
  body.querySelector(`tr[data-at="${at}"] .open`)?.focus({ preventScroll: true });
}

function bringIntoSight(at) {
  const top = body.getBoundingClientRect().top + at * ROW;
  const head = table.tHead.offsetHeight;
  if (top < head) scrollBy(0, top - head);
  else if (top + ROW > innerHeight) scrollBy(0, top + ROW - innerHeight);
  draw();
  focusOn(at);
}

// ---------------------------------------------------------------------------------------------------------------------
// One feature

const dialog = $("feature");
let opened = 0;

function contextList(title, list) {
  const made = element("div");
  made.append(element("h3", "", title));
  const rows = element("ol", "contexts");
  for (const context of list) {
    const line = element("li");
    const text = element("span", "text");
    text.append(...pieces(context));
    const peak = element("span", "number", Math.max(...context.values).toFixed(1));
    peak.title = "activation at the peak";
    line.append(peak, text);
    rows.append(line);
  }
  made.append(rows);
  return made;
}

function show(at) {
  opened = at;
  const i = order[at];
  const feature = columns.feature[i];
  $("feature-title").replaceChildren(`Feature ${feature} `, badge(i));
  const meaning = meanings[statements[columns.statement[i]]];
  const recurs = `Recurs in ${columns.recurs[i]} of ${columns.siblings[i]} ${peers}`;
  $("meaning").textContent = `${recurs}. Statement: it ${meaning}.`;
  const found = contexts[feature];
  const parts = [];
  if (found) {
    parts.push(contextList(`Strongest contexts of feature ${feature}`, found.contexts));
    const partner = found.partner;
    if (partner) {
      const title = `Its nearest partner: feature ${partner.feature} of ${partner.sibling}, cosine ${partner.cosine}`;
      parts.push(contextList(title, partner.contexts));
    } else parts.push(element("p", "n", `No partner in the ${peers} has contexts.`));
  } else {
    const hint = `This page has no contexts of this feature. Add --features ${feature} to the command, and run it again.`;
    parts.push(element("p", "n", hint));
  }
  $("contexts").replaceChildren(...parts);
  const figures = Object.keys(about).filter((name) => name !== "feature" && name !== "statement");
  $("figures").replaceChildren(
    ...figures.map((name) => {
      const pair = element("div");
      const term = element("dt", "", names[name] ?? name.replaceAll("_", " "));
      term.title = about[name];
      pair.append(term, element("dd", "", written(name, i)));
      return pair;
    }),
  );
  $("previous").disabled = at === 0;
  $("next").disabled = at === order.length - 1;
  history.replaceState(null, "", `#feature-${feature}`);
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

const step = (by) => {
  const at = opened + by;
  if (at >= 0 && at < order.length) show(at);
};
dialog.addEventListener("close", () => {
  history.replaceState(null, "", location.pathname);
  bringIntoSight(opened);
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close(); // outside
});
dialog.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
$("close").addEventListener("click", () => dialog.close());
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));

// ---------------------------------------------------------------------------------------------------------------------
// Controls

for (const name of shownColumns) {
  const head = element("th", `c-${name}${["feature", "statement", "prototype", "preview"].includes(name) ? "" : " figure"}`);
  head.scope = "col";
  if (name === "preview") {
    head.append(element("button", "", "Strongest context"));
    head.firstChild.disabled = true;
  } else {
    head.dataset.name = name;
    const press = element("button", "", names[name]);
    press.type = "button";
    press.title = about[name];
    press.addEventListener("click", () => {
      const same = sorting.name === name;
      sortBy(name, same ? !sorting.down : !["feature", "q_value", "statement", "prototype"].includes(name));
    });
    head.append(press);
  }
  table.tHead.rows[0].append(head);
}
body.addEventListener("click", (event) => {
  const at = event.target.closest("tr")?.dataset.at;
  if (at !== undefined) show(Number(at));
});
body.addEventListener("keydown", (event) => {
  const at = Number(event.target.closest("tr")?.dataset.at);
  const page = Math.floor(innerHeight / ROW) - 2;
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: order.length - 1 }[event.key];
  if (to === undefined || Number.isNaN(at)) return;
  event.preventDefault();
  bringIntoSight(Math.max(0, Math.min(order.length - 1, to)));
});
$("sort").addEventListener("change", () => sortBy($("sort").value, sorting.down));
$("turn").addEventListener("click", () => sortBy(sorting.name, !sorting.down));
$("all").addEventListener("click", () => {
  for (const box of document.querySelectorAll("[name=statement]")) box.checked = true;
  select();
});
$("controls").addEventListener("input", (event) => {
  if (event.target.id !== "sort") select();
});
$("controls").addEventListener("submit", (event) => event.preventDefault());
let waiting = false;
const later = () => {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    draw();
  });
};
addEventListener("scroll", later, { passive: true });
addEventListener("resize", later);
addEventListener("beforeprint", () => draw(true, 300)); // a printed table of all features would have no reader
addEventListener("afterprint", () => draw(true));

$("controls").hidden = false;
table.hidden = false;
select();
const linked = /^#feature-(\d+)$/.exec(location.hash);
if (linked) {
  const at = order.indexOf(columns.feature.indexOf(Number(linked[1])));
  if (at >= 0) show(at);
}
