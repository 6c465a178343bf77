// The tokens of the trace. Only changed cells are updated: there may be thousands.

function makeStrip(trace, onPoint, onPin) {
  const strip = document.getElementById("strip");
  const cells = trace.tokens.map((text, position) => tokenCell(trace, text, position));
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
  drawLegend();
  return { element: strip, cells, shown: new Array(cells.length).fill(""), marked: null };
}

function tokenCell(trace, text, position) {
  const kind = position < trace.nPrompt ? "prompt" : "generated";
  const cell = element("span", {
    class: `token ${kind}`,
    id: `token-${position}`,
    role: "option",
    tabindex: "-1",
    "aria-selected": "false",
    "aria-label": `${position}, ${kind === "prompt" ? "of the prompt" : kind}: ${text}`,
  });
  cell.append(element("span", { class: "text" }, text), element("span", { class: "bar" }));
  return cell;
}

// Tokens beyond the end of the array have no share.
function shadeStrip(strip, shares) {
  for (const [position, cell] of strip.cells.entries()) {
    const share = shares[position] ?? 0;
    const level = heatLevel(share).toFixed(3);
    if (strip.shown[position] === level) continue;
    strip.shown[position] = level;
    cell.style.setProperty("--level", level);
    cell.title = share > 0 ? percent(share) : "";
  }
}

// The square root, so that a few percent are visible.
function heatLevel(share) {
  return Math.sqrt(Math.min(1, Math.max(0, share)));
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

function drawLegend() {
  const legend = document.getElementById("legend");
  legend.append(swatch("prompt", "prompt", 0), swatch("generated", "generated", 0));
  for (const share of [0.01, 0.05, 0.25, 1]) legend.append(swatch("sample", percent(share), share));
  legend.append("share of the row, as shade and as bar");
}

function swatch(kind, text, share) {
  const cell = element("span", { class: `token ${kind}` });
  cell.append(element("span", { class: "text" }, text), element("span", { class: "bar" }));
  cell.style.setProperty("--level", heatLevel(share).toFixed(3));
  return cell;
}
