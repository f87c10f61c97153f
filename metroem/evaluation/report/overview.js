// Fill the overview: figures, curves and tables of all pairs.

function nameOf(where) {
  return `${where.file} pair ${where.pair}`;
}

// Each figure of a pair: label, digits, and which end is worst ("low" or "high").
const COLUMNS = [
  { label: "CPC before", of: (p) => p.score.cpc_before, digits: 3, worst: "low" },
  { label: "CPC", of: (p) => p.score.cpc, digits: 3, worst: "low" },
  { label: "gain", of: (p) => gain(p), digits: 3, worst: "low" },
  { label: "CPC near defects", of: (p) => p.score.ring_cpc, digits: 3, worst: "low" },
  { label: "worst chunk", of: (p) => p.where.worst && p.where.worst.figure, digits: 3, worst: "low" },
  { label: "field, px", of: (p) => p.score.length_px, digits: 2, worst: "high" },
  { label: "cycle p95, px", of: (p) => p.score.cycle_p95_px, digits: 2, worst: "high" },
  { label: "swap p95, px", of: (p) => p.score.swap_p95_px, digits: 2, worst: "high" },
  { label: "folds, ppm", of: (p) => p.score.folds_ppm, digits: 1, worst: "high" },
  { label: "compared, %", of: (p) => (hasValue(p) ? 100 * p.score.counted : 0), digits: 0, worst: "low" },
];

function gain(pair) {
  const { cpc, cpc_before: before } = pair.score;
  return cpc === null || before === null ? null : cpc - before;
}

/** Whether a pair can be compared at all: it has tissue with contrast on both sides. */
function hasValue(pair) {
  return pair.score.made_worse !== null;
}

/** Sort the ids of pairs, worst first by one column. An unknown figure is worst; pairs left out come last. */
function worstFirst(pairs, column, reversed) {
  const rank = (pair) => {
    if (!hasValue(pair)) return Infinity;
    const value = column.of(pair);
    if (typeof value !== "number") return -Infinity;
    return column.worst === "low" ? value : -value;
  };
  const ids = pairs.map((_, id) => id);
  ids.sort((a, b) => rank(pairs[a]) - rank(pairs[b]) || a - b);
  return reversed ? ids.reverse() : ids;
}

function fillAbout(about) {
  const facts = {
    pyramid: about.pyramid_path,
    checkpoint: about.checkpoint_name,
    "data set": about.dataset_path,
    finetuned: about.no_finetune ? "no" : "yes",
    made: `${about.made}, MetroEM ${about.version}`,
  };
  for (const [name, value] of Object.entries(facts)) {
    byId("about").append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  }
}

function fillTiles(data) {
  const all = (of) => mean(data.pairs.map(of));
  const worse = data.pairs.filter((pair) => pair.score.made_worse).length;
  const compared = data.pairs.filter(hasValue).length;
  const tiles = [
    [`${shown(all((p) => p.score.cpc_before), 3)} \u2192 ${shown(all((p) => p.score.cpc), 3)}`, "CPC before and after"],
    [`${worse} of ${compared}`, "pairs made worse"],
    [shown(all((p) => p.score.cycle_p95_px), 2), "cycle error p95, px"],
    [shown(all((p) => p.score.swap_p95_px), 2), "swap error p95, px"],
    [shown(all((p) => p.score.folds_ppm), 1), "folds off defects, ppm"],
  ];
  const known = data.sets.flatMap((set) => set.known);
  if (known.length) {
    const epe = (which) => shown(mean(known.map((section) => section.score[which].mean)), 2);
    tiles.push([`${epe("before")} \u2192 ${epe("after")}`, "EPE of known warps, px"]);
  }
  if (compared < data.pairs.length) {
    tiles.push([`${data.pairs.length - compared}`, "pairs left out: no overlap or no contrast"]);
  }
  for (const [figure, label] of tiles) {
    byId("tiles").append(make("div", { class: "tile" }, make("b", {}, figure), make("span", {}, label)));
  }
}

function fillStages(data) {
  const rows = [["no alignment", mean(data.pairs.map((pair) => pair.score.cpc_before))]];
  data.about.stages.forEach((name, stage) => {
    rows.push([name, mean(data.pairs.map((pair) => pair.stage_cpc[stage]))]);
  });
  for (const [name, value] of rows) {
    const bar = make("i");
    bar.style.width = `${100 * Math.max(0, value || 0)}%`;
    byId("stages").append(
      make("div", { class: "bar" }, make("span", {}, name), make("div", {}, bar), make("b", {}, shown(value, 3))),
    );
  }
}

function fillSets(data) {
  const columns = [
    { label: "image set", of: (set) => set.file },
    { label: "pairs", of: (set) => data.pairs.filter((pair) => pair.where.file === set.file).length, digits: 0 },
    { label: "left out", of: (set) => set.without_value, digits: 0 },
    { label: "px", of: (set) => `${set.rows} \u00d7 ${set.cols} at mip ${set.mip}` },
    { label: "CPC before", of: (set) => set.mean.cpc_before, digits: 3 },
    { label: "CPC", of: (set) => set.mean.cpc, digits: 3 },
    { label: "near defects before", of: (set) => set.mean.ring_cpc_before, digits: 3 },
    { label: "near defects", of: (set) => set.mean.ring_cpc, digits: 3 },
    { label: "cycle mean, px", of: (set) => set.mean.cycle_mean_px, digits: 2 },
    { label: "swap mean, px", of: (set) => set.mean.swap_mean_px, digits: 2 },
    { label: "det p1", of: (set) => set.mean.det_p01, digits: 2 },
    { label: "det p99", of: (set) => set.mean.det_p99, digits: 2 },
    { label: "volume", of: (set) => set.source || "not known" },
  ];
  fillTable(byId("sets"), columns, data.sets);
}

function fillKnown(data) {
  const known = data.sets.flatMap((set) => set.known);
  byId("known-section").hidden = !known.length;
  known.sort((a, b) => (b.score.after.mean ?? -1) - (a.score.after.mean ?? -1));
  const error = (which, key) => (section) => section.score[which][key];
  const columns = [
    { label: "section", of: (section) => `${section.where.file}, z ${section.where.z_tgt}` },
    { label: "EPE before", of: error("before", "mean"), digits: 2 },
    { label: "EPE", of: error("after", "mean"), digits: 2 },
    { label: "median", of: error("after", "median"), digits: 2 },
    { label: "p95", of: error("after", "p95"), digits: 2 },
    { label: "p99", of: error("after", "p99"), digits: 2 },
    { label: "> 8 px, %", of: ({ score }) => (score.made_worse === null ? null : 100 * score.after.above_eight), digits: 2 },
    { label: "near defects", of: (section) => section.score.near_px, digits: 2 },
    { label: "folds, ppm", of: (section) => section.score.folds_ppm, digits: 1 },
    { label: "on itself", of: (section) => section.score.identity_px, digits: 3 },
    { label: "worst at x, y (mip 0)", of: ({ where }) => (where.worst ? `${where.worst.x}, ${where.worst.y}` : "\u2013") },
  ];
  fillTable(byId("known"), columns, known);
}

function fillCurves(curves) {
  if (!curves.length) byId("curves-note").textContent = "The pyramid has no metrics.jsonl of this checkpoint.";
  for (const curve of curves) byId("curves").append(drawCurve(curve));
}

/** Draw one figure over the minutes of a stage; logarithmic if all values are above 0. */
function drawCurve(curve) {
  const [left, right, top, bottom] = [48, 330, 24, 164];
  const known = Object.values(curve.values).flat().filter((value) => value !== null);
  const isLog = known.every((value) => value > 0);
  const scale = isLog ? Math.log : (value) => value;
  let low = scale(Math.min(...known)), high = scale(Math.max(...known));
  const margin = 0.06 * (high - low) || 0.1;
  [low, high] = [low - margin, high + margin];
  const end = curve.minutes[curve.minutes.length - 1] || 1;
  const x = (minutes) => left + ((right - left) * minutes) / end;
  const y = (value) => bottom - ((bottom - top) * (scale(value) - low)) / (high - low);
  const plot = svg("svg", { viewBox: "0 0 340 190", role: "img" });
  plot.append(svg("text", { x: left, y: 14, class: "title" }, `stage ${curve.stage}: ${curve.figure}`));
  for (const fraction of [0, 0.5, 1]) {
    const level = low + fraction * (high - low);
    const height = bottom - fraction * (bottom - top);
    plot.append(svg("line", { x1: left, x2: right, y1: height, y2: height, class: "grid" }));
    const tick = (isLog ? Math.exp(level) : level).toPrecision(3);
    plot.append(svg("text", { x: left - 5, y: height + 4, "text-anchor": "end" }, String(Number(tick))));
    plot.append(svg("text", { x: x(fraction * end), y: bottom + 14, "text-anchor": "middle" }, String(Number((fraction * end).toPrecision(2)))));
  }
  plot.append(svg("text", { x: (left + right) / 2, y: bottom + 25, "text-anchor": "middle" }, "minutes"));
  curve.phases.forEach((phase, point) => {
    if (point && phase !== curve.phases[point - 1]) {
      const at = x(curve.minutes[point - 1]);
      plot.append(svg("line", { x1: at, x2: at, y1: top, y2: bottom, class: "phase" }));
    }
  });
  Object.entries(curve.values).forEach(([name, values], index) => {
    const points = values.map((value, point) => (value === null ? "" : `${x(curve.minutes[point])},${y(value)}`));
    plot.append(svg("polyline", { class: name, points: points.join(" ") }));
    plot.append(svg("text", { class: name, x: right - 4, y: top + 13 + 14 * index, "text-anchor": "end" }, name));
  });
  return plot;
}

/** Fill the sorted table of pairs; `onSort` gets the index of a column, `onOpen` an id. */
function fillPairs(data, order, sorting, onSort, onOpen) {
  const heads = [make("th"), make("th", {}, "pair"), make("th", {}, "z")];
  COLUMNS.forEach((column, index) => {
    const button = make("button", {}, column.label);
    button.addEventListener("click", () => onSort(index));
    const head = make("th", { class: "number" }, button);
    if (index === sorting.column) {
      const ascends = (column.worst === "low") !== sorting.reversed;
      head.setAttribute("aria-sort", ascends ? "ascending" : "descending");
    }
    heads.push(head);
  });
  const body = make("tbody");
  for (const id of order) {
    const pair = data.pairs[id];
    const link = make("a", { href: `#${id}` }, nameOf(pair.where));
    const row = make("tr", {}, make("td", {}, make("img", { src: pair.thumb, alt: "", loading: "lazy" })), make("td", {}, link));
    row.append(make("td", {}, `${pair.where.z_src} on ${pair.where.z_tgt}`));
    for (const { of, digits } of COLUMNS) row.append(make("td", { class: "number" }, shown(of(pair), digits)));
    if (!hasValue(pair)) row.cells[1].append(make("span", { class: "bad" }, "left out"));
    if (pair.score.made_worse) row.cells[1].append(make("span", { class: "bad" }, "made worse"));
    row.addEventListener("click", () => onOpen(id));
    body.append(row);
  }
  byId("pairs").replaceChildren(make("thead", {}, make("tr", {}, ...heads)), body);
}
