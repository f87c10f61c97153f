// Draw the page of a check from the figures that it contains.

const data = JSON.parse(byId("figures").textContent);
const { sections, stack } = data;
const hasBefore = "before" in stack;
const CURVES = [
  { title: "Correlation of neighbours", unit: "", digits: 3, main: "correlation", second: "correlation_p05" },
  { title: "Jump between sections, px", unit: "px", digits: 2, main: "jump_median_px", second: "jump_p95_px" },
  { title: "Jitter: change of the jump, px", unit: "px", digits: 2, main: "jitter_median_px", second: "jitter_p95_px" },
  { title: "Residual: the pyramid's own field, px", unit: "px", digits: 2, main: "residual_median_px", second: "residual_p95_px" },
  { title: "Folded pixels, %", unit: "%", digits: 4, main: "folds", second: null, times: 100 },
].filter((curve) => curve.main in sections[0]);
const SHOWN = { both: "section", section: "reference", reference: "both" };
const MAX_LABELS = 24; // of sections that stand out, over the curves
const MIN_SECTION_PX = 3; // height of a section in maps and cuts

function percent(value, digits) {
  return typeof value === "number" ? `${value ? (100 * value).toFixed(digits) : 0} %` : "\u2013";
}

/** Height of a section in a picture of many: enough to be seen. */
function sectionPx(count) {
  return Math.min(Math.max(Math.ceil(300 / count), MIN_SECTION_PX), 16);
}

function fillAbout() {
  const [rows, cols] = data.size_px;
  const facts = {
    volume: data.cv_path,
    sections: `${data.z_start} to ${data.z_end - 1}`,
    size: `${rows} \u00d7 ${cols} px at mip ${data.mip}`,
    before: data.before_path,
    pyramid: data.pyramid_path,
    fields: data.field_path,
    by: `MetroEM ${data.version}`,
  };
  for (const [name, value] of Object.entries(facts)) {
    if (value !== null) byId("about").append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  }
}

function fillTiles() {
  const change = (name, digits) => {
    const after = shown(stack[name], digits);
    return hasBefore ? `${shown(stack.before[name], digits)} \u2192 ${after}` : after;
  };
  const worst = stack.worst_z === null ? "\u2013" : `${shown(stack.correlation_worst, 3)} at z ${stack.worst_z}`;
  const tiles = [
    [change("correlation_median", 3), "correlation, median section"],
    [worst, "correlation, worst section"],
    [change("jump_median_px", 2), "jump, median, px"],
    [change("jump_p95_px", 2), "jump, 95 % are below, px"],
    [change("jitter_median_px", 2), "jitter, median, px"],
    [percent(stack.lost, 1), "windows without a match"],
  ];
  if ("residual_median_px" in stack) {
    tiles.push([`${shown(stack.residual_median_px, 2)}, ${shown(stack.residual_p95_px, 2)}`, "residual, median and 95 %, px"]);
  }
  if ("folds" in stack) tiles.push([percent(stack.folds, 4), "folded pixels"]);
  tiles.push([String(data.blank.length), "blank sections"]);
  for (const [figure, label] of tiles) {
    byId("tiles").append(make("div", { class: "tile" }, make("b", {}, figure), make("span", {}, label)));
  }
}

/** Explain every figure that the page shows. */
function fillMeaning() {
  const px = `px of mip ${data.mip}`;
  const meaning = [
    ["correlation", `of the grey levels of a section and the one before it, mean over squares of ${data.correlation_window_px} px. 1: the same picture; 0: nothing in common.`],
    ["jump", `how far a window of ${data.jump_window_px} px lies from where it fits the section before it best, ${px}. 0 is best, but tissue that runs obliquely jumps a little, too.`],
    ["jitter", `how much the jump changes from one section to the next, ${px}. Tissue that runs obliquely jumps steadily and does not jitter.`],
    ["without a match", `windows that fit the section before it nowhere within ${data.search_px} px: other tissue, a fold, dirt, or too far away.`],
    ["off by", `mean jump of the windows of a place; a window without a match counts as ${data.search_px} px.`],
  ];
  if ("residual_median_px" in stack) {
    meaning.push(["residual", `length of the field that the pyramid finds between a section and the one before it, ${px}: what it would still move, with its own error.`]);
  }
  if ("folds" in stack) {
    meaning.push(["folded pixels", "where the field turns tissue over. None is best; some at real folds of the section are no fault."]);
  }
  meaning.push(["blank", "a section without any data. The next one is compared with the last one that has data, up to three sections back."]);
  if (hasBefore) meaning.push(["a \u2192 b", `a: ${data.before_path}, measured at the same coordinates; b: this volume.`]);
  const list = byId("meaning").querySelector("dl");
  for (const [term, words] of meaning) list.append(make("div", {}, make("dt", {}, term), make("dd", {}, words)));
}

function drawCrop(place) {
  const label = make("span");
  const crop = make("button", { class: "crop", type: "button" }, make("div", { class: "section" }), make("div", { class: "reference" }), label);
  styled(crop, { "aspect-ratio": `${place.width} / ${place.height}` });
  for (const name of ["section", "reference"]) {
    styled(crop.querySelector(`.${name}`), { "background-image": `url("${place[name]}")` });
  }
  const words = { both: `z ${place.z} red, ${place.against} cyan`, section: `z ${place.z}`, reference: `z ${place.against}` };
  const show = (name) => {
    crop.dataset.shows = name;
    label.textContent = words[name];
    crop.setAttribute("aria-label", `Picture of ${words[name]}; press to see another`);
  };
  crop.addEventListener("click", () => show(SHOWN[crop.dataset.shows]));
  show("both");
  return crop;
}

function drawPlace(place, index) {
  const [first, end] = place.cut_z;
  const height = 6 * (end - first);
  const cut = make("img", { src: place.cut, alt: `Sections ${first} to ${end - 1} at this place, z down, ${place.cut_axis} to the right` });
  const along = make("div", { class: "along", title: `z down, ${place.cut_axis} to the right` }, styled(cut, { height: `${height}px` }));
  styled(along, { "--at": `${6 * (place.z - first + 0.5)}px` });
  const position = `${place.x}, ${place.y}, ${place.z}`;
  const copy = make("button", { type: "button" }, "Copy");
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(position);
    copy.textContent = "Copied";
  });
  const at = make("div", { class: "at" }, make("span", { class: "faint" }, "x, y, z"), make("code", {}, position), navigator.clipboard ? copy : "");
  const what = place.jump_px === null ? `no match within ${data.search_px} px` : `off by ${shown(place.error_px, 1)} px`;
  const head = make("h3", {}, make("span", { class: "rank" }, String(index + 1)), make("span", {}, what));
  const shift = place.jump_px === null ? "" : `, moved by x ${shown(place.jump_x_px, 1)}, y ${shown(place.jump_y_px, 1)} px`;
  const correlation = make("div", { class: "faint" }, `z ${place.z} on ${place.against}, correlation ${shown(place.correlation, 2)}${shift}`);
  return make("div", { class: "place", id: `place-${index + 1}` }, head, drawCrop(place), along, at, correlation);
}

// Curves

function line(name) {
  const sample = svg("svg", { viewBox: "0 0 30 10", "aria-hidden": "true" });
  sample.append(svg("line", { x1: 0, x2: 30, y1: 5, y2: 5, class: name }));
  return sample;
}

function fillLegend() {
  const entries = [["main", "median of the windows (correlation: mean)"], ["second", "95 % of the windows are below (correlation: above)"]];
  if (hasBefore) entries.push(["before", "median or mean before alignment"]);
  for (const [name, words] of entries) byId("legend").append(make("span", {}, line(name), words));
  byId("legend").append(make("span", {}, "\u25BC a section that stands out"), make("span", {}, "\u2715 a blank section"));
}

/** Values of one figure, one a section; null where it is not known. */
function valuesOf(curve, key, part) {
  return sections.map((section) => {
    const value = (part ? section[part] : section)[key];
    return typeof value === "number" ? value * (curve.times || 1) : null;
  });
}

function drawCurve(curve, width) {
  const [left, right, top, bottom] = [46, width - 8, 50, 150];
  const lines = [["main", valuesOf(curve, curve.main)]];
  if (curve.second) lines.push(["second", valuesOf(curve, curve.second)]);
  if (hasBefore && curve.main in stack.before) lines.push(["before", valuesOf(curve, curve.main, "before")]);
  const known = lines.flatMap(([, values]) => values.filter((value) => value !== null));
  const high = Math.max(...known, 0) || 1;
  const low = Math.min(...known, 0);
  const x = (index) => left + ((right - left) * (index + 0.5)) / sections.length;
  const y = (value) => bottom - ((bottom - top) * (value - low)) / (high - low);
  const plot = svg("svg", { viewBox: `0 0 ${width} 172`, role: "img", "aria-label": curve.title });
  plot.append(svg("text", { x: left, y: 12, class: "title" }, curve.title));
  for (const level of [low, (low + high) / 2, high]) {
    plot.append(svg("line", { x1: left, x2: right, y1: y(level), y2: y(level), class: "grid" }));
    plot.append(svg("text", { x: left - 5, y: y(level) + 4, "text-anchor": "end" }, String(Number(level.toPrecision(2)))));
  }
  const step = Math.ceil((90 * sections.length) / width);
  for (let index = 0; index < sections.length; index += step) {
    plot.append(svg("text", { x: x(index), y: bottom + 15, "text-anchor": "middle" }, `z ${sections[index].z}`));
  }
  for (const z of data.blank) {
    const at = x(z - data.z_start);
    plot.append(svg("path", { d: `M${at - 3} ${bottom - 3} l6 -6 m-6 0 l6 6`, class: "blank" }));
  }
  let labelEnd = -Infinity;
  data.stand_out.forEach(({ z }, order) => {
    const at = x(z - data.z_start);
    plot.append(svg("text", { x: at, y: top - 2, "text-anchor": "middle", class: "out" }, "\u25BC"));
    if (order < MAX_LABELS && at - labelEnd > 30) {
      plot.append(svg("text", { x: at, y: top - 12, "text-anchor": "middle", class: "out" }, String(z)));
      labelEnd = at;
    }
  });
  for (const [name, values] of lines.reverse()) drawLine(plot, name, values, x, y);
  const cursor = svg("line", { x1: -9, x2: -9, y1: top, y2: bottom, class: "cursor" });
  plot.append(cursor);
  return plot;
}

function describeSection(section) {
  if (data.blank.includes(section.z)) return `z ${section.z}: blank`;
  if (section.against === null) return `z ${section.z}: nothing before it to compare it with`;
  const parts = CURVES.map((curve) => {
    const value = section[curve.main];
    const name = curve.title.split(/[:,]/)[0].toLowerCase();
    return `${name} ${shown(value === null ? null : value * (curve.times || 1), curve.digits)} ${curve.unit}`.trim();
  });
  return `z ${section.z} on ${section.against}: ${parts.join(", ")}, ${percent(section.lost, 0)} of the windows without a match`;
}

function drawCurves() {
  const box = byId("curves");
  const width = Math.max(box.clientWidth, 240);
  box.replaceChildren(...CURVES.map((curve) => drawCurve(curve, width)));
  const [left, right] = [46, width - 8];
  const read = (index) => {
    if (index < 0 || index >= sections.length) return;
    box.dataset.index = index;
    byId("readout").textContent = describeSection(sections[index]);
    const x = left + ((right - left) * (index + 0.5)) / sections.length;
    for (const cursor of box.querySelectorAll(".cursor")) {
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
    }
  };
  const point = (event) => {
    const at = event.clientX - box.getBoundingClientRect().left;
    read(Math.floor(((at - left) / (right - left)) * sections.length));
  };
  box.onpointermove = point;
  box.onpointerdown = point;
  box.onkeydown = (event) => {
    const at = Number(box.dataset.index ?? -1);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: sections.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    read(to);
  };
  read(Number(box.dataset.index ?? -1));
}

// Maps and cuts

/** A picture with z down: ticks at its left. */
function framed(picture, alt, height, zOfRow, ...over) {
  const ticks = make("div", { class: "ticks" });
  const count = Math.max(2, Math.min(9, Math.floor(height / 40), data.z_end - data.z_start));
  for (let tick = 0; tick < count; tick++) {
    const fraction = tick / (count - 1);
    const rows = zOfRow.length;
    const row = Math.round(fraction * (rows - 1));
    const label = make("span", {}, tick ? String(zOfRow[row]) : `z ${zOfRow[row]}`);
    ticks.append(styled(label, { top: `${(100 * (row + 0.5)) / rows}%` }));
  }
  const frame = make("div", { class: "picture" }, make("img", { src: picture, alt }), ...over);
  return make("div", { class: "framed" }, ticks, styled(frame, { height: `${height}px` }));
}

function zOfRows(rows) {
  const total = data.z_end - data.z_start;
  return Array.from({ length: rows }, (_, row) => data.z_start + Math.floor(((row + 0.5) * total) / rows));
}

function drawMap(map) {
  const height = map.rows * sectionPx(map.rows);
  const drawn = [];
  const markers = data.worst.map((place, index) => {
    const marker = make("a", { class: "marker", href: `#place-${index + 1}`, title: place.words }, String(index + 1));
    const [across, down] = place.on_map;
    // Markers that would lie on each other are moved to the right.
    let moved = 0;
    const isTaken = () => drawn.some((one) => one.across === across && one.moved === moved && Math.abs(one.down - down) * height < 16);
    while (isTaken()) moved += 1;
    drawn.push({ across, down, moved });
    return styled(marker, { left: `calc(${100 * across}% + ${20 * moved}px)`, top: `${100 * down}%` });
  });
  const [worse, better] = map.bad === "high" ? ["", " (worse)"] : [" (worse)", ""];
  const scale = make("div", { class: "scale" }, `${map.low}${worse}`, styled(make("i"), { background: `linear-gradient(to right, ${data.colors.join(", ")})` }));
  scale.append(`${shown(map.high, map.unit ? 1 : 0)} ${map.unit}${better}`, make("i", { class: "unknown" }), "not known");
  const title = map.unit ? `${map.title}, ${map.unit}` : map.title;
  const tall = make("div", { class: "tall" }, framed(map.picture, `Map of ${title}`, height, zOfRows(map.rows), ...markers));
  return make("figure", { class: "map" }, make("figcaption", {}, title), tall, scale);
}

function fillMaps() {
  const [rows, cols] = data.num_cells;
  const area = `area${rows * cols === 1 ? "" : "s"} of ${data.cell_px} px`;
  byId("maps-note").textContent =
    `A row is a section, a column one of its ${rows * cols} ${area}: ${rows} along x, of each ${cols} along y. ` +
    "Numbers are those of the worst places. Hatched: nothing to compare, " +
    `or less than half a window of ${data.jump_window_px} px.`;
  byId("maps").append(...data.maps.map(drawMap));
}

function drawCut(cut) {
  const rows = Math.ceil((data.z_end - data.z_start) / cut.step);
  const height = rows * sectionPx(rows);
  const other = cut.axis === "y" ? "x" : "y";
  const zs = Array.from({ length: rows }, (_, row) => data.z_start + row * cut.step);
  const every = cut.step > 1 ? `, every ${cut.step} sections` : "";
  const title = `z down, ${cut.axis} to the right, at ${other} ${cut.at}${every}`;
  const ends = make("div", { class: "ends" }, make("span", {}, `${cut.axis} ${cut.start}`), make("span", {}, `${cut.axis} ${cut.end}`));
  const frame = framed(cut.picture, `Cut: ${title}`, height, zs);
  frame.append(make("span"), ends);
  return make("figure", { class: "cut" }, make("figcaption", {}, title), make("div", { class: "tall" }, frame));
}

function fillCuts() {
  byId("cuts-note").textContent = "Enlarged along z; all sections are shown equally bright. Borders of cells should run down without steps; black rows are blank sections.";
  byId("cuts").append(...data.cuts.map(drawCut));
}

function fillOut() {
  const byZ = new Map(data.stand_out.map(({ z, reason }) => [z, [reason]]));
  for (const z of data.unplaced) byZ.set(z, [...(byZ.get(z) || []), "matched nothing when sections were placed"]);
  const reasons = [...byZ].map(([z, all]) => ({ z, reason: all.join("; ") })).sort((a, b) => a.z - b.z);
  byId("out-note").textContent = reasons.length ? "" : "None.";
  byId("out").hidden = !reasons.length;
  const of = (z) => sections[z - data.z_start] || {};
  fillTable(byId("out"), [
    { label: "z", of: ({ z }) => z, digits: 0 },
    { label: "why", of: ({ reason }) => reason },
    { label: "correlation", of: ({ z }) => of(z).correlation, digits: 3 },
    { label: "jump, median, px", of: ({ z }) => of(z).jump_median_px, digits: 2 },
    { label: "jump, 95 %, px", of: ({ z }) => of(z).jump_p95_px, digits: 2 },
    { label: "without a match, %", of: ({ z }) => (of(z).lost === null ? null : 100 * of(z).lost), digits: 0 },
    { label: "tissue, %", of: ({ z }) => 100 * of(z).tissue, digits: 0 },
  ], reasons);
  byId("folded-section").hidden = !data.folded.length;
  fillTable(byId("folded"), [
    { label: "z", of: ({ z }) => z, digits: 0 },
    { label: "x, y, z", of: ({ x, y, z }) => `${x}, ${y}, ${z}` },
    { label: "pixels of the field", of: ({ pixels }) => pixels, digits: 0 },
  ], data.folded);
}

byId("verdict").textContent = data.verdict;
fillAbout();
fillTiles();
fillMeaning();
byId("worst").append(...data.worst.map(drawPlace));
fillLegend();
drawCurves();
fillMaps();
fillCuts();
fillOut();
addEventListener("resize", drawCurves);
