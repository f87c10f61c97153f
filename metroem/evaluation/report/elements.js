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

/** Fill a table with columns {label, of, digits?}; columns with digits are numbers. */
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
  const heads = columns.map(({ label, digits }) => make("th", digits === undefined ? {} : { class: "number" }, label));
  table.replaceChildren(make("thead", {}, make("tr", {}, ...heads)), body);
}

function svg(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}
