// Draw the pictures of one pair on a canvas, with arrows, masks or correlation over them.

const KEPT_PAIRS = 4; // pairs kept decoded; a picture of 1024 px takes 4 MB
const LOW_CPC = 0, HIGH_CPC = 1; // ends of the colours of the correlation
// A scale that does not need red and green to be told apart (viridis, 6 points).
const HEAT = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];
const FLICKER_MS = 400;

const decoded = new Map(); // id -> promise of `decode`

/** Decode the pictures of a pair, unless they are kept decoded. */
function load(id) {
  if (!decoded.has(id)) decoded.set(id, decode(id));
  const pair = decoded.get(id);
  decoded.delete(id); // the pair opened last goes to the end
  decoded.set(id, pair);
  for (const old of [...decoded.keys()].slice(0, -KEPT_PAIRS)) decoded.delete(old);
  return pair;
}

async function decode(id) {
  const pair = JSON.parse(byId(blockOf(id)).textContent);
  const names = ["before", "after", "tgt", "field", "masks"];
  const images = await Promise.all(names.map((name) => decodeImage(pair[name])));
  names.forEach((name, index) => (pair[name] = images[index]));
  pair.tints = {};
  return pair;
}

/** Decode a data URI to a bitmap; unlike an image it keeps no copy of the text. */
function decodeImage(uri) {
  const [head, text] = uri.split(",");
  const type = head.slice("data:".length, -";base64".length);
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return createImageBitmap(new Blob([bytes], { type }));
}

/** Multiply a picture by a colour; the result is kept with its pair. */
function tinted(pair, name, color) {
  if (!pair.tints[name]) {
    const canvas = make("canvas", { width: pair[name].width, height: pair[name].height });
    const context = canvas.getContext("2d");
    context.drawImage(pair[name], 0, 0);
    context.globalCompositeOperation = "multiply";
    context.fillStyle = color;
    context.fillRect(0, 0, canvas.width, canvas.height);
    pair.tints[name] = canvas;
  }
  return pair.tints[name];
}

function heatColor(cpc) {
  const level = (HEAT.length - 1) * Math.min(1, Math.max(0, (cpc - LOW_CPC) / (HIGH_CPC - LOW_CPC)));
  const below = Math.min(HEAT.length - 2, Math.floor(level));
  const fraction = level - below;
  const mix = HEAT[below].map((value, index) => Math.round(value + fraction * (HEAT[below + 1][index] - value)));
  return `rgb(${mix.join(" ")})`;
}

/** Show one pair on a canvas; units are pixels of the pair's mip. */
class Viewer {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.pair = null;
    this.view = { scale: 1, x: 0, y: 0 }; // screen = scale * pixel + (x, y)
  }

  /** Show a pair: its decoded pictures, size {width, height}, chunk side and marker. */
  show(pair, size, chunk) {
    const isOther = !this.pair || size.width !== this.size.width || size.height !== this.size.height;
    [this.pair, this.size, this.chunk] = [pair, size, chunk];
    if (isOther) this.fit();
  }

  fit() {
    const { clientWidth, clientHeight } = this.canvas;
    const scale = Math.min(clientWidth / this.size.width, clientHeight / this.size.height);
    this.view = {
      scale,
      x: (clientWidth - scale * this.size.width) / 2,
      y: (clientHeight - scale * this.size.height) / 2,
    };
  }

  zoom(factor, x, y) {
    const scale = Math.min(32, Math.max(0.1, this.view.scale * factor));
    const change = scale / this.view.scale;
    this.view = { scale, x: x - change * (x - this.view.x), y: y - change * (y - this.view.y) };
  }

  /** Move a pixel into the middle, enlarged. */
  centre(point, scale) {
    this.view = {
      scale,
      x: this.canvas.clientWidth / 2 - scale * point.x,
      y: this.canvas.clientHeight / 2 - scale * point.y,
    };
  }

  /** Find the pixel at a position of the canvas; null outside of the pictures. */
  pixelAt(x, y) {
    const { view, size } = this;
    const pixel = { x: Math.floor((x - view.x) / view.scale), y: Math.floor((y - view.y) / view.scale) };
    const isInside = pixel.x >= 0 && pixel.y >= 0 && pixel.x < size.width && pixel.y < size.height;
    return isInside ? pixel : null;
  }

  /** Look up the correlation of a pixel's chunk, before or after; null if it does not count. */
  correlationAt(pixel, side) {
    const row = this.pair.correlation[side][Math.floor(pixel.y / this.chunk)];
    const value = row && row[Math.floor(pixel.x / this.chunk)];
    return value === undefined ? null : value;
  }

  draw(state) {
    if (!this.pair) return;
    const { canvas, context, view, pair } = this;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth * ratio, canvas.clientHeight * ratio].map(Math.round);
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    context.setTransform(ratio * view.scale, 0, 0, ratio * view.scale, ratio * view.x, ratio * view.y);
    context.imageSmoothingEnabled = view.scale * ratio < 2;
    context.save();
    context.beginPath(); // squares of averages reach beyond the pictures
    context.rect(0, 0, this.size.width, this.size.height);
    context.clip();
    this.drawPictures(state);
    if (state.layers.has("correlation")) this.drawCorrelation(state.side);
    context.imageSmoothingEnabled = false;
    if (state.layers.has("masks")) this.put(pair.masks, pair.factor);
    if (state.layers.has("arrows")) this.drawArrows();
    context.restore();
    if (state.marker) this.drawMarker(state.marker);
  }

  put(image, factor) {
    this.context.drawImage(image, 0, 0, image.width * factor, image.height * factor);
  }

  drawPictures({ mode, side, showsTgt, share }) {
    const { context, pair, size } = this;
    const src = pair[side];
    if (mode === "field") {
      context.imageSmoothingEnabled = true;
      this.put(pair.field, pair.fieldFactor);
    } else if (mode === "overlay") {
      this.put(tinted(pair, side, "#f00"), pair.factor);
      context.globalCompositeOperation = "lighter";
      this.put(tinted(pair, "tgt", "#0ff"), pair.factor);
      context.globalCompositeOperation = "source-over";
    } else if (mode === "blend") {
      this.put(pair.tgt, pair.factor);
      context.globalAlpha = share;
      this.put(src, pair.factor);
      context.globalAlpha = 1;
    } else if (mode === "slider") {
      this.put(pair.tgt, pair.factor);
      context.save();
      context.beginPath();
      context.rect(0, 0, share * size.width, size.height);
      context.clip();
      this.put(src, pair.factor);
      context.restore();
      context.fillStyle = "#ffd400";
      context.fillRect(share * size.width - 1 / this.view.scale, 0, 2 / this.view.scale, size.height);
    } else {
      this.put(showsTgt ? pair.tgt : src, pair.factor);
    }
  }

  drawCorrelation(side) {
    const { context, chunk } = this;
    context.globalAlpha = 0.6;
    this.pair.correlation[side].forEach((row, down) => {
      row.forEach((cpc, right) => {
        if (cpc === null) return;
        context.fillStyle = heatColor(cpc);
        context.fillRect(right * chunk, down * chunk, chunk, chunk);
      });
    });
    context.globalAlpha = 1;
    if (chunk * this.view.scale < 34) return;
    context.font = `${11 / this.view.scale}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    this.pair.correlation[side].forEach((row, down) => {
      row.forEach((cpc, right) => {
        if (cpc === null) return;
        context.fillStyle = cpc > 0.55 ? "#000" : "#fff";
        context.fillText(cpc.toFixed(2), (right + 0.5) * chunk, (down + 0.5) * chunk);
      });
    });
  }

  /** Factor by which arrows are enlarged: the long ones fill a square. */
  arrowScale() {
    return Math.max(1, this.pair.arrows.square / this.pair.fullPx);
  }

  drawArrows() {
    const { context } = this;
    const { square, x, y } = this.pair.arrows;
    const factor = this.arrowScale();
    const head = square / 6;
    context.beginPath();
    x.forEach((row, down) => {
      row.forEach((dx, right) => {
        const dy = y[down][right];
        const [fromX, fromY] = [(right + 0.5) * square, (down + 0.5) * square];
        const [toX, toY] = [fromX + factor * dx, fromY + factor * dy];
        const angle = Math.atan2(dy, dx);
        context.moveTo(fromX, fromY);
        context.lineTo(toX, toY);
        if (factor * Math.hypot(dx, dy) < head) return;
        for (const rotation of [2.6, -2.6]) {
          context.moveTo(toX, toY);
          context.lineTo(toX + head * Math.cos(angle + rotation), toY + head * Math.sin(angle + rotation));
        }
      });
    });
    for (const [width, color] of [[3, "#000"], [1.4, "#ffe95c"]]) {
      context.lineWidth = width / this.view.scale;
      context.strokeStyle = color;
      context.stroke();
    }
  }

  drawMarker(marker) {
    const { context } = this;
    const half = marker.half;
    context.lineWidth = 2 / this.view.scale;
    context.strokeStyle = "#ff2bd6";
    context.strokeRect(marker.x - half, marker.y - half, 2 * half, 2 * half);
  }
}
