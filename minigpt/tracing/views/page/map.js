// Maps of rows: a line for each token, newest at the bottom; a column for each earlier token.

const LABEL_CELL = 11; // minimum cell size, in pixels, to label each line with its token
const MOST_CELL = 16;
const MOST_HEIGHT = 640;
const TOP = 6; // room for half a label
const TICK_ROOM = 18;
const SMALL_BINS = 48;

// The large map of the chosen rows. onChoose is called with the position of a token.
function makeMap(trace, onChoose) {
  const canvas = byId("map");
  const map = { trace, canvas, rows: null, image: null, scale: null, position: null, pointed: null };
  canvas.addEventListener("click", (event) => {
    const at = cellAt(map, event);
    if (at) onChoose(trace.firstRow + at.step);
  });
  canvas.addEventListener("pointermove", (event) => pointAt(map, cellAt(map, event)));
  canvas.addEventListener("pointerleave", () => pointAt(map, null));
  new ResizeObserver(() => paintMap(map)).observe(canvas.parentElement);
  return map;
}

// rows: one array of numbers for each step. scale: that of signed numbers, or null for shares.
function fillMap(map, rows, scale) {
  Object.assign(map, { rows, scale, image: null });
  paintMap(map);
}

function markMap(map, position) {
  map.position = position;
  paintMap(map);
}

function paintMap(map) {
  const { trace, canvas, rows } = map;
  const width = canvas.parentElement.clientWidth;
  if (!rows || rows.length === 0 || width === 0) return;
  const ratio = window.devicePixelRatio || 1;
  const place = layoutMap(trace, width, rows.length);
  if (map.image?.width !== place.binsAcross) map.image = null;
  map.place = place;
  canvas.width = Math.round(width * ratio);
  const height = TOP + place.height + TICK_ROOM;
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.translate(0, TOP);
  map.image ??= drawnBins(pooled(rows, trace.firstRow, place.binsAcross, place.binsDown), map.scale);
  context.imageSmoothingEnabled = false;
  context.drawImage(map.image, place.left, 0, place.width, place.height);
  drawLabels(context, map);
  drawMarks(context, map);
}

function layoutMap(trace, room, nRows) {
  const nColumns = trace.firstRow + nRows - 1;
  const fits = (left) => Math.min(MOST_CELL, (room - left) / nColumns, MOST_HEIGHT / nRows);
  const hasNames = fits(110) >= LABEL_CELL;
  const left = hasNames ? 110 : 30;
  let cell = fits(left);
  if (cell > 2) cell = Math.floor(cell * 2) / 2;
  const [width, height] = [cell * nColumns, cell * nRows];
  const bins = (n, pixels) => Math.max(1, Math.min(n, Math.floor(pixels)));
  return {
    left, cell, width, height, nColumns, nRows, hasNames,
    binsAcross: bins(nColumns, width), binsDown: bins(nRows, height),
  };
}

// The number farthest from 0 in each bin, so that single strong ones stay visible; NaN for bins of
// tokens that did not exist yet.
function pooled(rows, firstRow, binsAcross, binsDown) {
  const nColumns = firstRow + rows.length - 1;
  const bins = new Float32Array(binsAcross * binsDown).fill(NaN);
  for (const [step, row] of rows.entries()) {
    const start = Math.floor((step * binsDown) / rows.length) * binsAcross;
    for (let column = 0; column < row.length; column++) {
      const bin = start + Math.floor((column * binsAcross) / nColumns);
      if (!(Math.abs(bins[bin]) >= Math.abs(row[column]))) bins[bin] = row[column];
    }
  }
  return { bins, width: binsAcross, height: binsDown };
}

function drawnBins({ bins, width, height }, scale) {
  const canvas = element("canvas", { width, height });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const hues = { heat: hue("--heat"), plus: hue("--plus"), minus: hue("--minus"), view: hue("--view") };
  for (const [i, value] of bins.entries()) {
    if (Number.isNaN(value)) continue;
    const level = levelOf(value, scale);
    const over = scale === null ? hues.heat : level < 0 ? hues.minus : hues.plus;
    // Blended with the background of cells in view, so that cells of later tokens stay blank.
    const part = 0.95 * Math.abs(level);
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = part * over[c] + (1 - part) * hues.view[c];
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

function hue(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim().split(" ").map(Number);
}

function drawLabels(context, { trace, place }) {
  const { left, cell, width, height, nRows, nColumns, hasNames } = place;
  const style = getComputedStyle(document.body);
  context.fillStyle = style.color;
  context.direction = "ltr";
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.font = `${hasNames ? Math.min(12, cell + 1) : 11}px ui-monospace, "DejaVu Sans Mono", monospace`;
  const every = hasNames ? 1 : niceStep(14 / cell);
  for (let step = 0; step < nRows; step += every) {
    const position = trace.firstRow + step;
    const name = hasNames ? `${isolated(shortened(trace.names[position]))} ${position}` : String(position);
    context.fillText(name, left - 5, (step + 0.5) * cell, left - 6);
  }
  context.font = '11px ui-monospace, "DejaVu Sans Mono", monospace';
  context.textAlign = "center";
  for (let column = 0; column < nColumns; column += niceStep(30 / cell)) {
    context.fillText(String(column), left + (column + 0.5) * cell, height + 10);
  }
  // A line at the end of the prompt.
  context.strokeStyle = style.color;
  context.globalAlpha = 0.5;
  context.setLineDash([3, 3]);
  line(context, left + trace.nPrompt * cell, 0, left + trace.nPrompt * cell, height);
  context.setLineDash([]);
  context.globalAlpha = 1;
}

function shortened(name) {
  const characters = Array.from(name);
  return characters.length > 9 ? `${characters.slice(0, 8).join("")}…` : name;
}

function line(context, x, y, toX, toY) {
  context.beginPath();
  context.moveTo(x, y);
  context.lineTo(toX, toY);
  context.stroke();
}

// The smallest of 1, 2, 5, 10, 20 ... that is not below least.
function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, least)));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= least) ?? power;
}

// A frame around the line of the current token, or around its column if it has no line.
function drawMarks(context, { trace, place, position, pointed }) {
  const { left, cell, width, height } = place;
  context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--focus");
  context.lineWidth = 2;
  const step = (position ?? -1) - trace.firstRow;
  if (step >= 0) context.strokeRect(left, step * cell, width, Math.max(cell, 2));
  else if (position !== null) context.strokeRect(left + position * cell, 0, Math.max(cell, 2), height);
  if (pointed) context.strokeRect(left + pointed.column * cell - 1, pointed.step * cell - 1, cell + 2, cell + 2);
}

function cellAt({ place, trace }, event) {
  if (!place) return null;
  const column = Math.floor((event.offsetX - place.left) / place.cell);
  const step = Math.floor((event.offsetY - TOP) / place.cell);
  const isInside = step >= 0 && step < place.nRows && column < trace.firstRow + step;
  return isInside ? { step, column: Math.max(0, column) } : null;
}

function pointAt(map, at) {
  map.pointed = at;
  paintMap(map);
  const { trace, rows, scale } = map;
  const value = at && rows[at.step][at.column];
  setText("map-readout", at
    ? `${tokenName(trace, trace.firstRow + at.step)} to ${tokenName(trace, at.column)}: ${valueText(value, scale)}`
    : MAP_HINT);
}

const MAP_HINT = "Hover over a cell to read it; click to choose its line.";

// The small maps of all heads, drawn in short slices so that the page stays responsive.
function fillSmallMaps(trace, grid, measure, sliceMs = 12) {
  if (grid.drawn === measure) return;
  grid.drawn = measure;
  const size = Math.min(SMALL_BINS, trace.firstRow + trace.steps.length - 1);
  const down = Math.max(1, Math.min(size, trace.steps.length));
  let head = 0;
  const drawSome = () => {
    const end = performance.now() + sliceMs;
    while (head < grid.cells.length && performance.now() < end) {
      const view = { measure, reduction: "mean", layer: Math.floor(head / trace.nHead), head: head % trace.nHead };
      const rows = rowsOf(trace, view);
      const image = drawnBins(pooled(rows, trace.firstRow, size, down), trace.scales[measure]);
      const canvas = grid.cells[head].querySelector("canvas");
      [canvas.width, canvas.height] = [size, down];
      canvas.getContext("2d").drawImage(image, 0, 0);
      head++;
    }
    if (head < grid.cells.length && grid.drawn === measure) setTimeout(drawSome);
  };
  drawSome();
}
