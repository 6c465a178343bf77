// The strip of tokens. Only changed cells are updated, because there may be thousands.

function makeStrip(trace, onPoint, onPin) {
  const strip = byId("strip");
  const cells = trace.texts.map((text, position) => tokenCell(trace, text, position));
  const lineEnds = new Set(trace.lineEnds);
  for (const [position, cell] of cells.entries()) {
    strip.append(cell);
    if (lineEnds.has(position)) strip.append(element("span", { class: "line-end", "aria-hidden": "true" }));
  }
  strip.addEventListener("pointerover", (event) => {
    const position = cells.indexOf(event.target.closest(".token"));
    if (position >= 0) onPoint(position);
  });
  strip.addEventListener("click", (event) => {
    const position = cells.indexOf(event.target.closest(".token"));
    if (position >= 0) onPin(position);
  });
  return { element: strip, cells, shown: new Array(cells.length).fill(""), marked: null };
}

function tokenCell(trace, text, position) {
  const kind = position < trace.nPrompt ? "prompt" : "generated";
  const name = trace.names[position];
  // If tokens share a character, the first shows it, and the style sheet marks the others.
  const cell = element("span", {
    class: `token ${kind}${text === "" ? " continued" : ""}`,
    id: `token-${position}`,
    role: "option",
    tabindex: "-1",
    "aria-selected": "false",
    "aria-label": `${position}, ${kind === "prompt" ? "of the prompt" : kind}: ${name}`,
  });
  cell.append(element("span", { class: "text" }, text), element("span", { class: "bar" }));
  return cell;
}

// Tokens beyond the end of shares have no number. scale: that of signed numbers, or null for shares.
function shadeStrip(trace, strip, shares, scale) {
  for (const [position, cell] of strip.cells.entries()) {
    const share = shares[position] ?? 0;
    const level = levelOf(share, scale).toFixed(3);
    const shown = `${level} ${scale}`;
    if (strip.shown[position] === shown) continue;
    strip.shown[position] = shown;
    shade(cell, level, scale);
    const parts = [share === 0 ? "" : valueText(share, scale), bytesText(trace, position)];
    cell.title = parts.filter(Boolean).join("; ");
  }
}

function shade(cell, level, scale) {
  cell.style.setProperty("--level", Math.abs(level));
  cell.classList.toggle("plus", scale !== null && level > 0);
  cell.classList.toggle("minus", scale !== null && level < 0);
}

// The bytes of a token if they are not plain ASCII: a character may be split over several tokens.
function bytesText(trace, position) {
  const bytes = trace.bytes[position];
  return bytes ? `bytes ${bytes}` : "";
}

function markToken(strip, position, isPinned) {
  const old = strip.cells[strip.marked];
  if (old) {
    old.classList.remove("current", "pinned");
    old.setAttribute("aria-selected", "false");
    old.tabIndex = -1;
  }
  strip.marked = position;
  const cell = strip.cells[position];
  cell.classList.add("current");
  cell.classList.toggle("pinned", isPinned);
  cell.setAttribute("aria-selected", String(isPinned));
  cell.tabIndex = 0;
}

// The nearest token on the line above (-1) or below (1).
function tokenOnLine(strip, position, direction) {
  const here = strip.cells[position];
  const centre = (cell) => cell.offsetLeft + cell.offsetWidth / 2;
  let best = position;
  let bestDistance = Infinity;
  let line = null;
  for (let i = position + direction; i >= 0 && i < strip.cells.length; i += direction) {
    const cell = strip.cells[i];
    if (cell.offsetTop === here.offsetTop) continue;
    line ??= cell.offsetTop;
    if (cell.offsetTop !== line) break;
    const distance = Math.abs(centre(cell) - centre(here));
    if (distance < bestDistance) [best, bestDistance] = [i, distance];
  }
  return best;
}

function drawLegend(scale) {
  const legend = byId("legend");
  if (legend.dataset.scale === String(scale)) return;
  legend.dataset.scale = String(scale);
  legend.replaceChildren(swatch("prompt", "prompt", 0, scale), swatch("generated", "generated", 0, scale));
  const samples = scale === null ? [0.01, 0.05, 0.25, 1] : [-1, -0.25, 0, 0.25, 1].map((part) => part * scale);
  for (const value of samples) legend.append(swatch("sample", valueText(value, scale), value, scale));
  legend.append(scale === null
    ? "share of the row, as shade and bar"
    : "shade and bar: blue raised the token, orange lowered it, unshaded is 0");
}

function swatch(kind, text, value, scale) {
  const cell = element("span", { class: `token ${kind}` });
  cell.append(element("span", { class: "text" }, text), element("span", { class: "bar" }));
  shade(cell, levelOf(value, scale).toFixed(3), scale);
  return cell;
}
