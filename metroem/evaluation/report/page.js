// Show one pair: controls, keys, and positions in the volume.

const data = JSON.parse(byId("summary").textContent);
const items = [...data.pairs, ...data.known]; // their positions are ids
const viewer = new Viewer(byId("canvas"));
const MODES = { flicker: ["Flicker", "f"], slider: ["Slider", "s"], blend: ["Blend", "b"], overlay: ["Red/cyan", "o"], field: ["Field", "d"] };
const SIDES = { before: ["Before", "1"], after: ["After", "2"] };
const LAYERS = { arrows: ["Arrows", "a"], correlation: ["Correlation", "c"], masks: ["Folds, masks", "m"] };
// Masks differ without colours, too: by stripes and a rim.
const MASK_WORDS = { "not compared": "not compared", defect: "defect (striped)", fold: "fold (white rim)" };
const NEUROGLANCER = "https://neuroglancer-demo.appspot.com/#!";
const POSITION = data.about.is_of_files ? "x, y in pixels" : "x, y, z in mip-0 pixels";
const WORST_SCALE = 3; // screen pixels per pixel of the pair when the worst chunk is shown

const sorting = { column: 1, reversed: false };
let order = madeWorseFirst(data.pairs, worstFirst(data.pairs, COLUMNS[1], false));
const EPE = { of: ({ score }) => score.after.mean, worst: "high" };
const knownOrder = madeWorseFirst(data.known, worstFirst(data.known, EPE, false));
let opener = null; // what had the focus, and where the page was, when the viewer opened
let current = null; // id of the pair shown
let timer = null; // of the flicker
const state = { mode: "flicker", side: "after", showsTgt: false, share: 0.5, layers: new Set(), marker: null };

const KEYS = [
  [["\u2192", "n"], "next pair", () => step(1), ["ArrowRight", "n"]],
  [["\u2190", "p"], "previous pair", () => step(-1), ["ArrowLeft", "p"]],
  [["Space"], "flicker once: src, tgt", () => flip(), [" "]],
  [["f"], "automatic flicker, on or off", () => toggleFlicker(), ["f"]],
  [["s"], "slider: src left, tgt right", () => choose("mode", "slider"), ["s"]],
  [["b"], "blend", () => choose("mode", "blend"), ["b"]],
  [["o"], "src red, tgt cyan", () => choose("mode", "overlay"), ["o"]],
  [["d"], "the field (displacements)", () => choose("mode", "field"), ["d"]],
  [["1", "2"], "src before, after", (key) => choose("side", key === "1" ? "before" : "after"), ["1", "2"]],
  [["a"], "arrows", () => toggleLayer("arrows"), ["a"]],
  [["c"], "correlation", () => toggleLayer("correlation"), ["c"]],
  [["m"], "folds and masks", () => toggleLayer("masks"), ["m"]],
  [["w"], "zoom to the worst chunk", () => showWorst(), ["w"]],
  [["0"], "whole pictures (wheel zooms, drag moves)", () => refit(), ["0"]],
  [["Esc"], "all pairs", () => (location.hash = ""), ["Escape"]],
];

/** Name the block of pictures of an id. */
function blockOf(id) {
  return isKnown(id) ? `known-${id - data.pairs.length}` : `pair-${id}`;
}

/** Whether an id is that of a section warped by a known field. */
function isKnown(id) {
  return id >= data.pairs.length;
}

/** Ids of what is opened one after the other with this one. */
function idsBeside(id) {
  return isKnown(id) ? knownOrder.map((number) => data.pairs.length + number) : order;
}

function setOf(pair) {
  return data.sets.find((set) => set.file === pair.where.file);
}

/** Convert a pixel of the pictures to a position in the volume, mip-0 pixels. */
function inVolume(pair, pixel) {
  const span = 2 ** setOf(pair).mip;
  return { x: pair.corner[0] + pixel.x * span, y: pair.corner[1] + pixel.y * span };
}

function redraw() {
  if (current !== null) viewer.draw(state);
}

// Choices

function fillChoices() {
  const fill = (group, type, names, onChange) => {
    for (const [value, [label, key]] of Object.entries(names)) {
      const input = make("input", { type, name: group, value });
      input.addEventListener("change", () => onChange(value));
      byId(group).append(make("label", { class: "choice" }, input, make("span", {}, `${label} `, make("kbd", {}, key))));
    }
  };
  fill("modes", "radio", MODES, (mode) => choose("mode", mode));
  fill("sides", "radio", SIDES, (side) => choose("side", side));
  fill("layers", "checkbox", LAYERS, (layer) => toggleLayer(layer));
  byId("share").addEventListener("input", (event) => {
    state.share = Number(event.target.value);
    refresh();
  });
  for (const [names, label] of KEYS) {
    const keys = names.flatMap((name) => [make("kbd", {}, name), " "]);
    byId("keys").append(make("dt", {}, ...keys), make("dd", {}, label));
  }
}

function choose(control, value) {
  stopFlicker();
  state[control] = value;
  state.showsTgt = false;
  refresh();
}

function toggleLayer(layer) {
  if (!state.layers.delete(layer)) state.layers.add(layer);
  refresh();
}

function flip() {
  state.mode = "flicker";
  state.showsTgt = !state.showsTgt;
  refresh();
}

function toggleFlicker() {
  if (timer !== null) return stopFlicker();
  timer = setInterval(flip, FLICKER_MS);
  flip();
}

function stopFlicker() {
  clearInterval(timer);
  timer = null;
}

/** Update controls, legend and canvas from the state. */
function refresh() {
  for (const input of document.querySelectorAll("#modes input")) input.checked = input.value === state.mode;
  for (const input of document.querySelectorAll("#sides input")) input.checked = input.value === state.side;
  for (const input of document.querySelectorAll("#layers input")) input.checked = state.layers.has(input.value);
  byId("share-label").hidden = !["slider", "blend"].includes(state.mode);
  byId("share").value = state.share;
  const src = `src ${state.side}`;
  byId("shown").textContent = {
    flicker: state.showsTgt ? "tgt" : src,
    slider: `${src} | tgt`,
    blend: `${Math.round(100 * state.share)} % ${src}, ${Math.round(100 - 100 * state.share)} % tgt`,
    overlay: `${src} red, tgt cyan`,
    field: "field",
  }[state.mode];
  fillLegend();
  redraw();
}

function fillLegend() {
  const lines = [];
  const full = viewer.pair ? shown(viewer.pair.fullPx, 1) : "";
  if (state.mode === "field") {
    const wheel = make("img", { src: data.wheel, alt: "colours of directions" });
    lines.push(make("div", {}, wheel, make("span", {}, `direction from tgt to where src is read; full colour: ${full} px`)));
  }
  if (state.layers.has("arrows") && viewer.pair) {
    lines.push(make("div", {}, `arrows: from tgt to where src is read, ${shown(viewer.arrowScale(), 1)} times their length`));
  }
  if (state.layers.has("correlation")) {
    const scale = make("canvas", { width: 130, height: 1 });
    const context = scale.getContext("2d");
    for (let column = 0; column < 130; column++) {
      context.fillStyle = heatColor(LOW_CPC + (column / 129) * (HIGH_CPC - LOW_CPC));
      context.fillRect(column, 0, 1, 1);
    }
    lines.push(make("div", {}, `CPC ${state.side} `, String(LOW_CPC), scale, String(HIGH_CPC)));
  }
  if (state.layers.has("masks")) {
    const line = make("div");
    for (const [name, color] of Object.entries(data.masks)) {
      const swatch = make("span", { class: `swatch ${name.replaceAll(" ", "-")}` });
      line.append(make("span", { class: "entry" }, styled(swatch, { "--color": color }), MASK_WORDS[name]));
    }
    lines.push(line);
  }
  byId("legend").replaceChildren(...lines);
}

// The pair

async function openPair(id, at) {
  const isNew = current === null;
  if (isNew) opener = { focus: document.activeElement, top: window.scrollY };
  current = id;
  const pair = items[id];
  byId("overview").hidden = true;
  byId("pair").hidden = false;
  byId("tip").hidden = true;
  if (!byId("pair").contains(document.activeElement)) byId("canvas").focus();
  if (isNew) window.scrollTo(0, 0);
  byId("pair").style.setProperty("--top", `${document.querySelector("header").offsetHeight}px`);
  const beside = idsBeside(id);
  const position = beside.indexOf(id);
  byId("place").textContent = `${position + 1} of ${beside.length}`;
  let title = nameOf(pair.where);
  if (isKnown(id)) title += ": warped by a known field";
  else if (!data.about.is_of_files) title += `: z ${pair.where.z_src} on ${pair.where.z_tgt}`;
  byId("name").replaceChildren(title, ...marksOf(pair));
  document.title = `${nameOf(pair.where)} - MetroEM report`;
  fillFigures(pair);
  const pictures = await load(id);
  if (current !== id) return; // another pair was opened meanwhile
  const set = setOf(pair);
  viewer.show(pictures, { width: set.rows, height: set.cols }, data.about.chunk_px);
  mark(at || worstPixel(pair), data.about.chunk_px / 2);
  if (at) viewer.centre(at, WORST_SCALE);
  refresh();
  byId("canvas").dataset.shows = id;
  for (const next of [position + 1, position - 1]) {
    if (beside[next] !== undefined) load(beside[next]);
  }
}

function showOverview() {
  stopFlicker();
  current = null;
  document.title = "MetroEM report";
  byId("pair").hidden = true;
  byId("overview").hidden = false;
  if (!opener) return;
  opener.focus.focus({ preventScroll: true });
  window.scrollTo(0, opener.top);
  opener = null;
}

function step(by) {
  if (current === null) return;
  const ids = idsBeside(current);
  const next = ids[ids.indexOf(current) + by];
  if (next !== undefined) location.hash = `#${next}`;
}

function fillFigures(pair) {
  const rows = "after" in pair.score ? errorRows(pair.score) : scoreRows(pair);
  const lines = rows.map(([name, means, ...cells]) => {
    const tag = name ? "td" : "th";
    const head = make("th", {}, explain(make("span", {}, name), MEANING[means]));
    return make("tr", {}, head, ...cells.map((cell) => make(tag, { class: "number" }, cell)));
  });
  byId("figures").replaceChildren(...lines);
}

/** Rows of figures of a pair: name, key of `MEANING`, two cells. */
function scoreRows(pair) {
  const { score } = pair;
  return [
    ["", "", "before", "after"],
    ["CPC", "cpc", shown(score.cpc_before, 3), shown(score.cpc, 3)],
    ...data.about.stages.slice(0, -1).map((name, stage) => [`  after ${name}`, "cpc", "", shown(pair.stage_cpc[stage], 3)]),
    ["CPC near defects", "ring", shown(score.ring_cpc_before, 3), shown(score.ring_cpc, 3)],
    ["", "", "mean", "p95"],
    ["cycle error, px", "cycle", shown(score.cycle_mean_px, 2), shown(score.cycle_p95_px, 2)],
    ["swap error, px", "swap", shown(score.swap_mean_px, 2), shown(score.swap_p95_px, 2)],
    ["length of the field, px", "length", shown(score.length_px, 2), ""],
    ["folds off defects, ppm", "folds", "", shown(score.folds_ppm, 1)],
    ["determinant p1, p99", "det", shown(score.det_p01, 2), shown(score.det_p99, 2)],
    ["compared, %", "compared", "", hasValue(pair) ? shown(100 * score.counted, 0) : "none"],
  ];
}

/** The same of a section warped by a known field. */
function errorRows(score) {
  const error = (label, key) => [label, "epe", shown(score.before[key], 2), shown(score.after[key], 2)];
  return [
    ["", "", "before", "after"],
    error("EPE mean, px", "mean"),
    error("EPE median, px", "median"),
    error("EPE p95, px", "p95"),
    error("EPE p99, px", "p99"),
    ["above 8 px, %", "share", "", shown(percentAboveEight(score), 2)],
    ["EPE near defects, px", "near", "", shown(score.near_px, 2)],
    ["folds, ppm", "folds", "", shown(score.folds_ppm, 1)],
    ["section on itself, px", "itself", "", shown(score.identity_px, 3)],
  ];
}

/** Find the middle of the worst chunk, a pixel of the pictures; null if no chunk counts. */
function worstPixel(pair) {
  const { worst } = pair.where;
  if (!worst) return null;
  const span = 2 ** setOf(pair).mip;
  return { x: (worst.x - pair.corner[0]) / span, y: (worst.y - pair.corner[1]) / span };
}

function showWorst() {
  const pixel = current === null ? null : worstPixel(items[current]);
  if (!pixel) return;
  mark(pixel, data.about.chunk_px / 2);
  viewer.centre(pixel, WORST_SCALE);
  redraw();
}

function refit() {
  viewer.fit();
  redraw();
}

/** Mark a pixel, and show its position in the volume. */
function mark(pixel, half) {
  state.marker = pixel && { ...pixel, half };
  const pair = items[current];
  const { worst } = pair.where;
  const set = setOf(pair);
  const lines = [];
  if (pixel) {
    const { x, y } = inVolume(pair, pixel);
    const isWorst = worst && worst.x === x && worst.y === y;
    const what = isWorst ? `Worst chunk (${isKnown(current) ? "EPE, px" : "CPC"} ${shown(worst.figure, isKnown(current) ? 2 : 3)})` : "Marked";
    lines.push(make("div", {}, `${what}, ${POSITION}:`));
    const sides = [["src", pair.where.z_src], ["tgt", pair.where.z_tgt]];
    if (data.about.is_of_files) lines.push(make("div", {}, make("span", { class: "copy" }, `${x}, ${y}`)));
    else for (const [side, z] of sides) {
      const at = make("span", { class: "copy" }, `${x}, ${y}, ${z}`);
      const line = make("div", {}, `${side} `, at);
      if (set.neuroglancer) line.append(" ", linkTo(set, [x, y, z]));
      lines.push(line);
    }
  }
  const source = data.about.is_of_files ? "src " : "Volume ";
  lines.push(make("div", {}, source, make("code", {}, set.source || "not known")));
  byId("where").replaceChildren(...lines);
}

function linkTo(set, [x, y, z]) {
  const view = {
    layers: [{ type: "image", source: set.neuroglancer, name: "sections" }],
    position: [x + 0.5, y + 0.5, z + 0.5],
    crossSectionScale: 2 ** set.mip,
    layout: "xy",
  };
  if (set.resolution) {
    const meters = set.resolution.map((nm) => [nm * 1e-9, "m"]);
    view.dimensions = { x: meters[0], y: meters[1], z: meters[2] };
  }
  const href = NEUROGLANCER + encodeURIComponent(JSON.stringify(view));
  return make("a", { href, target: "_blank", rel: "noopener noreferrer" }, "neuroglancer");
}

// Pointer and keys

function followPointer() {
  const canvas = byId("canvas");
  let held = null; // position where the button went down, and whether the pointer moved since
  canvas.addEventListener("pointerdown", (event) => {
    if (current === null || !viewer.pair) return;
    const line = viewer.view.x + viewer.view.scale * state.share * viewer.size.width;
    const isLine = state.mode === "slider" && Math.abs(event.offsetX - line) < 14;
    held = { x: event.offsetX, y: event.offsetY, isLine, moved: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (current === null || !viewer.pair) return;
    if (held) drag(held, event);
    else showPosition(viewer.pixelAt(event.offsetX, event.offsetY));
  });
  canvas.addEventListener("pointerup", (event) => {
    const pixel = held && !held.moved && viewer.pixelAt(event.offsetX, event.offsetY);
    if (pixel) mark(pixel, 6 / viewer.view.scale);
    held = null;
    redraw();
  });
  canvas.addEventListener("pointerleave", () => showPosition(null));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    viewer.zoom(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
    redraw();
  }, { passive: false });
}

function drag(held, event) {
  const [dx, dy] = [event.offsetX - held.x, event.offsetY - held.y];
  if (!held.moved && Math.hypot(dx, dy) < 3) return;
  held.moved = true;
  if (held.isLine) {
    const at = (event.offsetX - viewer.view.x) / (viewer.view.scale * viewer.size.width);
    state.share = Math.min(1, Math.max(0, at));
    refresh();
    return;
  }
  viewer.view.x += dx;
  viewer.view.y += dy;
  [held.x, held.y] = [event.offsetX, event.offsetY];
  redraw();
}

function showPosition(pixel) {
  if (!pixel) {
    byId("pointer").textContent = "";
    return;
  }
  const { x, y } = inVolume(items[current], pixel);
  const [before, after] = ["before", "after"].map((side) => shown(viewer.correlationAt(pixel, side), 2));
  const mip = data.about.is_of_files ? "" : " (mip 0)";
  byId("pointer").textContent = `x ${x}, y ${y}${mip}; CPC of the chunk ${before} \u2192 ${after}`;
}

function followKeys() {
  document.addEventListener("keydown", (event) => {
    if (current === null || event.ctrlKey || event.metaKey || event.altKey) return;
    // Space and arrows belong to the control that has the focus.
    const isControl = event.target.closest("button, input, select, summary, a");
    if (isControl && (event.key === " " || event.key.startsWith("Arrow"))) return;
    const entry = KEYS.find(([, , , names]) => names.includes(event.key));
    if (!entry) return;
    event.preventDefault();
    entry[2](event.key);
  });
}

function sortBy(column) {
  sorting.reversed = sorting.column === column && !sorting.reversed;
  sorting.column = column;
  order = worstFirst(data.pairs, COLUMNS[column], sorting.reversed);
  fillPairs(data, order, sorting, sortBy, openById);
}

function openById(id) {
  location.hash = `#${id}`;
}

/** Open what the address names: "#3", or "#3@120,64" for a pixel of it. */
function followHash() {
  const match = /^#(\d+)(?:@(\d+),(\d+))?$/.exec(location.hash);
  if (!match || Number(match[1]) >= items.length) return showOverview();
  openPair(Number(match[1]), match[2] && { x: Number(match[2]), y: Number(match[3]) });
}

function start() {
  fillAbout(data.about);
  fillNotes(data);
  fillWorst(data);
  fillTiles(data);
  fillStages(data);
  fillCurves(data.about.curves);
  fillSets(data);
  for (const id of ["training", "image-sets"]) byId(id).hidden = Boolean(data.about.is_of_files);
  fillRoles(data);
  fillKnown(data, knownOrder, (number) => openById(data.pairs.length + number));
  fillPairs(data, order, sorting, sortBy, openById);
  fillChoices();
  followPointer();
  followKeys();
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("back").addEventListener("click", () => (location.hash = ""));
  window.addEventListener("hashchange", followHash);
  window.addEventListener("resize", () => {
    if (current === null || !viewer.pair) return;
    viewer.fit();
    redraw();
  });
  byId("loading").hidden = true;
  followHash();
}

start();
