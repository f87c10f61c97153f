// Make elements of a page. Text from the data is set only as textContent, never as HTML.

/** Make an element with attributes and children; strings become text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function byId(id) {
  return document.getElementById(id);
}

/** Write a figure with this number of digits, or a dash if it is unknown. */
function shown(value, digits) {
  if (typeof value !== "number") return "\u2013";
  const text = value.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text; // not -0.0
}

function mean(values) {
  const known = values.filter((value) => typeof value === "number");
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
}

/** Fill a table with columns {label, of, digits?, means?}; columns with digits are numbers, `means` explains a figure. */
function fillTable(table, columns, rows) {
  const body = make("tbody");
  for (const row of rows) {
    const line = body.insertRow();
    for (const { of, digits } of columns) {
      const value = of(row);
      const isNumber = digits !== undefined;
      line.append(make("td", isNumber ? { class: "number" } : {}, isNumber ? shown(value, digits) : value));
    }
  }
  const heads = columns.map(({ label, digits, means }) => {
    const name = explain(make("span", {}, label), means);
    return make("th", digits === undefined ? {} : { class: "number" }, name);
  });
  table.replaceChildren(make("thead", {}, make("tr", {}, ...heads)), body);
}

function svg(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

/** Set styles from script: the page's policy allows no style attributes. */
function styled(element, styles) {
  for (const [name, value] of Object.entries(styles)) element.style.setProperty(name, value);
  return element;
}

/** Draw values as lines that end where a value is unknown; single values as dots. */
function drawLine(plot, name, values, x, y) {
  let points = [];
  const finish = () => {
    if (points.length > 1) plot.append(svg("polyline", { class: name, points: points.join(" ") }));
    else if (points.length === 1) {
      const [cx, cy] = points[0].split(",");
      plot.append(svg("circle", { class: name, cx, cy, r: 2.2 }));
    }
    points = [];
  };
  values.forEach((value, index) => (value === null ? finish() : points.push(`${x(index)},${y(value)}`)));
  finish();
}

/** Show a line about an element while it has the focus or the pointer; without a focus of its own it gets one. */
function explain(element, words) {
  if (!words) return element;
  const tip = byId("tip");
  const isControl = element.matches("button, a, input, select, summary");
  if (!isControl) element.tabIndex = 0;
  element.classList.add("explained");
  const show = () => {
    tip.textContent = words;
    tip.hidden = false;
    element.setAttribute("aria-describedby", "tip");
    const box = element.getBoundingClientRect();
    const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8));
    const below = box.bottom + 4;
    const isLow = below + tip.offsetHeight > window.innerHeight;
    styled(tip, { left: `${left}px`, top: `${isLow ? box.top - tip.offsetHeight - 4 : below}px` });
  };
  const hide = () => {
    tip.hidden = true;
    element.removeAttribute("aria-describedby");
  };
  element.addEventListener("pointerenter", show);
  element.addEventListener("focus", show);
  element.addEventListener("pointerleave", hide);
  element.addEventListener("blur", hide);
  return element;
}
