// Fill the overview: worst places, figures, curves and tables of all pairs.

// What each figure is, and what is good.
const MEANING = {
  before: "Mean correlation of chunks of 64 px without alignment.",
  cpc: "Mean correlation of src and tgt in chunks of 64 px, after alignment. 1: the same picture; 0: nothing in common. Good: higher than before.",
  gain: "CPC after alignment less CPC before. Good: above 0.",
  ring: "CPC within 32 px of folds, cracks and dirt. Good: higher than before.",
  chunk: "CPC of the worst chunk. Good: near the mean of the pair.",
  length: "Mean length of the field: how far pixels are moved. Neither good nor bad.",
  cycle: "How far a pixel of tgt misses itself after going to src and back: the mean, or p95, which 95 % of the pixels stay below. Good: near 0.",
  swap: "Difference between the field of the swapped pair and the inverse of the field: the mean, or p95, which 95 % of the pixels stay below. Good: near 0.",
  folds: "Pixels of a million, off defects, where the field folds over itself. Good: 0.",
  compared: "Pixels with tissue in both sections under the field. Good: as many as the sections share.",
  det: "Local change of area, smallest and largest hundredth of the pixels. 1: none; below 0: folded. Good: around 1.",
  worse: "Pairs whose CPC fell by more than 0.001. Good: 0.",
  epe: "Endpoint error: distance of the field from the exact one; 95 or 99 % of the pixels stay below p95 or p99. Good: lower than before, near 0.",
  share: "Pixels whose endpoint error is above 8 px. Good: 0.",
  near: "Mean endpoint error near folds, cracks and dirt. Good: as elsewhere.",
  itself: "Mean length of the field from the section to itself. Good: 0.",
  left: "Pairs without a chunk of tissue with contrast in both sections; they are in no mean.",
};

function nameOf({ file, pair, z_src: src, z_tgt: tgt }) {
  if (data.about.is_of_files) return file;
  return src === tgt ? `${file} section z ${tgt}` : `${file} pair ${pair}`;
}

// Each figure of a pair: label, digits, and which end is worst ("low" or "high").
const COLUMNS = [
  { label: "CPC before", means: "before", of: (p) => p.score.cpc_before, digits: 3, worst: "low" },
  { label: "CPC", means: "cpc", of: (p) => p.score.cpc, digits: 3, worst: "low" },
  { label: "gain", means: "gain", of: (p) => gain(p), digits: 3, worst: "low" },
  { label: "CPC near defects", means: "ring", of: (p) => p.score.ring_cpc, digits: 3, worst: "low" },
  { label: "worst chunk", means: "chunk", of: (p) => p.where.worst && p.where.worst.figure, digits: 3, worst: "low" },
  { label: "field, px", means: "length", of: (p) => p.score.length_px, digits: 2, worst: "high" },
  { label: "cycle p95, px", means: "cycle", of: (p) => p.score.cycle_p95_px, digits: 2, worst: "high" },
  { label: "swap p95, px", means: "swap", of: (p) => p.score.swap_p95_px, digits: 2, worst: "high" },
  { label: "folds, ppm", means: "folds", of: (p) => p.score.folds_ppm, digits: 1, worst: "high" },
  { label: "compared, %", means: "compared", of: (p) => (hasValue(p) ? 100 * p.score.counted : 0), digits: 0, worst: "low" },
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

/** Move the ids of what alignment made worse to the front. */
function madeWorseFirst(pairs, ids) {
  const isWorse = (id) => Boolean(pairs[id].score.made_worse);
  return [...ids.filter(isWorse), ...ids.filter((id) => !isWorse(id))];
}

function fillAbout(about) {
  const facts = {
    pyramid: about.pyramid_path,
    checkpoint: about.checkpoint_name,
    [about.is_of_files ? "images" : "data set"]: about.dataset_path,
    ...(about.placed && { placed: `src was ${about.placed}` }),
    finetuned: about.no_finetune ? "no" : "yes",
    pairs: pairsDone(about.coverage),
    made: `${about.made}, MetroEM ${about.version}`,
  };
  for (const [name, value] of Object.entries(facts)) {
    byId("about").append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  }
}

function pairsDone({ done, in_data_set: all }) {
  return done === all ? String(done) : `${done} of ${all}`;
}

/** Say first what a reader must know before any figure. */
function fillNotes(data) {
  const { done, asked, in_data_set: all, was_stopped: wasStopped } = data.about.coverage;
  const notes = [];
  const sections = done === asked ? ", not all warped sections" : "";
  if (wasStopped) notes.push(`Stopped: ${done} of ${asked} pairs${sections}. The same command resumes from here.`);
  if (asked < all) notes.push(`${asked} of ${all} pairs, spread evenly over the data set (--max_pairs).`);
  const trained = data.pairs.filter((pair) => pair.role === "trained on").length;
  if (trained === data.pairs.length) notes.push("These pairs were trained on: figures flatter.");
  else if (trained) notes.push(`${trained} of ${data.pairs.length} pairs were trained on: their figures flatter.`);
  byId("notes").append(...notes.map((note) => make("li", {}, note)));
  byId("notes-section").hidden = !notes.length;
}

function fillWorst(data) {
  const most = Math.max(...data.worst.map(({ pair }) => data.worst.filter((place) => place.pair === pair).length));
  if (data.pairs.length > 1) byId("worst-note").textContent = `At most ${Math.max(3, most)} of one pair.`;
  if (!data.worst.length) byId("worst").append(make("p", {}, "No chunk can be compared."));
  data.worst.forEach((place, index) => {
    const pair = data.pairs[place.pair];
    const { x, y } = inVolume(pair, place);
    const [left, top, right, bottom] = place.box.map((at) => 100 * at);
    const frame = styled(make("i"), { left: `${left}%`, top: `${top}%`, width: `${right - left}%`, height: `${bottom - top}%` });
    const title = make("h3", {}, make("span", { class: "rank" }, String(index + 1)), `CPC ${shown(place.cpc, 2)}`);
    explain(title, MEANING.cpc);
    const picture = make("img", { src: place.picture, alt: `Worst place ${index + 1}: open pair ${nameOf(pair.where)} there` });
    const link = make("a", { class: "spot", href: `#${place.pair}@${place.x},${place.y}` }, picture, frame);
    const name = make("div", {}, data.about.is_of_files ? "" : nameOf(pair.where), ...marksOf(pair));
    const position = data.about.is_of_files ? `${x}, ${y}` : `${x}, ${y}, ${pair.where.z_src}`;
    const at = make("div", { class: "faint" }, data.about.is_of_files ? "x, y " : "x, y, z ", make("code", {}, position));
    byId("worst").append(make("div", { class: "place" }, title, link, name, at));
  });
}

/** Marks of a pair: words, so that they differ without colours. */
function marksOf({ score, role }) {
  const marks = [];
  if (score.made_worse === null) marks.push(make("span", { class: "bad" }, "left out"));
  if (score.made_worse) marks.push(make("span", { class: "bad" }, "\u25BC made worse"));
  if (role) marks.push(make("span", { class: "role" }, role));
  return marks;
}

function fillTiles(data) {
  const all = (of) => mean(data.pairs.map(of));
  const worse = data.pairs.filter((pair) => pair.score.made_worse).length;
  const compared = data.pairs.filter(hasValue).length;
  const tiles = [
    [`${shown(all((p) => p.score.cpc_before), 3)} \u2192 ${shown(all((p) => p.score.cpc), 3)}`, "CPC before and after", "cpc"],
    [`${worse ? "\u25BC " : ""}${worse} of ${compared}`, "pairs made worse", "worse"],
    [shown(all((p) => p.score.cycle_p95_px), 2), "cycle error p95, px", "cycle"],
    [shown(all((p) => p.score.swap_p95_px), 2), "swap error p95, px", "swap"],
    [shown(all((p) => p.score.folds_ppm), 1), "folds off defects, ppm", "folds"],
  ];
  const { known } = data;
  if (known.length) {
    const epe = (which) => shown(mean(known.map((section) => section.score[which].mean)), 2);
    tiles.push([`${epe("before")} \u2192 ${epe("after")}`, "EPE of known warps, px", "epe"]);
  }
  if (compared < data.pairs.length) {
    tiles.push([`${data.pairs.length - compared}`, "pairs left out: no overlap or no contrast", "left"]);
  }
  for (const [figure, label, means] of tiles) {
    const name = explain(make("span", {}, label), MEANING[means]);
    byId("tiles").append(make("div", { class: "tile" }, make("b", {}, figure), name));
  }
}

function fillStages(data) {
  const rows = [["no alignment", mean(data.pairs.map((pair) => pair.score.cpc_before))]];
  data.about.stages.forEach((name, stage) => {
    rows.push([name, mean(data.pairs.map((pair) => pair.stage_cpc[stage]))]);
  });
  for (const [name, value] of rows) {
    const words = name === "no alignment" ? MEANING.before : MEANING.cpc;
    const bar = make("i");
    bar.style.width = `${100 * Math.max(0, value || 0)}%`;
    byId("stages").append(
      make("div", { class: "bar" }, make("span", {}, explain(make("span", {}, name), words)), make("div", {}, bar), make("b", {}, shown(value, 3))),
    );
  }
}

/** Columns of means over pairs; `of` finds the means of a row. */
function meanColumns(of) {
  return [
    { label: "CPC before", means: MEANING.before, of: (row) => of(row).cpc_before, digits: 3 },
    { label: "CPC", means: MEANING.cpc, of: (row) => of(row).cpc, digits: 3 },
    { label: "near defects before", means: MEANING.ring, of: (row) => of(row).ring_cpc_before, digits: 3 },
    { label: "near defects", means: MEANING.ring, of: (row) => of(row).ring_cpc, digits: 3 },
    { label: "cycle mean, px", means: MEANING.cycle, of: (row) => of(row).cycle_mean_px, digits: 2 },
    { label: "swap mean, px", means: MEANING.swap, of: (row) => of(row).swap_mean_px, digits: 2 },
    { label: "folds, ppm", means: MEANING.folds, of: (row) => of(row).folds_ppm, digits: 1 },
    { label: "det p1", means: MEANING.det, of: (row) => of(row).det_p01, digits: 2 },
    { label: "det p99", means: MEANING.det, of: (row) => of(row).det_p99, digits: 2 },
  ];
}

function fillSets(data) {
  const columns = [
    { label: "image set", of: (set) => set.file },
    { label: "pairs", of: (set) => data.pairs.filter((pair) => pair.where.file === set.file).length, digits: 0 },
    { label: "left out", means: MEANING.left, of: (set) => set.without_value, digits: 0 },
    { label: "px", of: (set) => `${set.rows} \u00d7 ${set.cols} at mip ${set.mip}` },
    ...meanColumns((set) => set.mean),
    { label: "volume", of: (set) => set.source || "not known" },
  ];
  fillTable(byId("sets"), columns, data.sets);
}

/** Compare pairs that were trained on with others, where an image set has both. */
function fillRoles(data) {
  const groups = data.sets.flatMap(({ file, groups }) => Object.entries(groups).map(([role, group]) => ({ file, role, ...group })));
  byId("roles-section").hidden = !groups.length;
  const columns = [
    { label: "image set", of: ({ file }) => file },
    { label: "role", of: ({ role }) => role || "not known" },
    { label: "pairs", of: (group) => group.num_pairs, digits: 0 },
    ...meanColumns((group) => group.mean),
  ];
  fillTable(byId("roles"), columns, groups);
}

/** Fill the table of warped sections; `onOpen` gets the position of one in `data.known`. */
function fillKnown(data, order, onOpen) {
  byId("known-section").hidden = !data.known.length;
  const error = (which, key) => (number) => data.known[number].score[which][key];
  const score = (number) => data.known[number].score;
  const columns = [
    { label: "", of: (number) => make("img", { src: data.known[number].thumb, alt: "", loading: "lazy" }) },
    { label: "section", of: (number) => nameCell(data.known[number], `#${data.pairs.length + number}`) },
    { label: "EPE before", means: MEANING.epe, of: error("before", "mean"), digits: 2 },
    { label: "EPE", means: MEANING.epe, of: error("after", "mean"), digits: 2 },
    { label: "median", means: MEANING.epe, of: error("after", "median"), digits: 2 },
    { label: "p95", means: MEANING.epe, of: error("after", "p95"), digits: 2 },
    { label: "p99", means: MEANING.epe, of: error("after", "p99"), digits: 2 },
    { label: "> 8 px, %", means: MEANING.share, of: (number) => percentAboveEight(score(number)), digits: 2 },
    { label: "near defects", means: MEANING.near, of: (number) => score(number).near_px, digits: 2 },
    { label: "folds, ppm", means: MEANING.folds, of: (number) => score(number).folds_ppm, digits: 1 },
    { label: "on itself", means: MEANING.itself, of: (number) => score(number).identity_px, digits: 3 },
  ];
  fillTable(byId("known"), columns, order);
  [...byId("known").tBodies[0].rows].forEach((row, index) => row.addEventListener("click", () => onOpen(order[index])));
}

function percentAboveEight(score) {
  return score.made_worse === null ? null : 100 * score.after.above_eight;
}

/** Name a pair or section as a link, with its marks. */
function nameCell(item, href) {
  return make("div", {}, make("a", { href }, nameOf(item.where)), ...marksOf(item));
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
    drawLine(plot, name, values, (point) => x(curve.minutes[point]), y);
    plot.append(svg("text", { class: name, x: right - 4, y: top + 13 + 14 * index, "text-anchor": "end" }, name));
  });
  return plot;
}

/** Fill the sorted table of pairs; `onSort` gets the index of a column, `onOpen` an id. */
function fillPairs(data, order, sorting, onSort, onOpen) {
  const heads = [make("th"), make("th", {}, "pair"), make("th", {}, "z")];
  COLUMNS.forEach((column, index) => {
    const button = explain(make("button", {}, column.label), MEANING[column.means]);
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
    const thumb = make("img", { src: pair.thumb, alt: "", loading: "lazy" });
    const row = make("tr", {}, make("td", {}, thumb), make("td", {}, nameCell(pair, `#${id}`)));
    row.append(make("td", {}, `${pair.where.z_src} on ${pair.where.z_tgt}`));
    for (const { of, digits } of COLUMNS) row.append(make("td", { class: "number" }, shown(of(pair), digits)));
    row.addEventListener("click", () => onOpen(id));
    body.append(row);
  }
  byId("pairs").replaceChildren(make("thead", {}, make("tr", {}, ...heads)), body);
}
