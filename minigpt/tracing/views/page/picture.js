// Download of the strip, as currently shown, as an SVG file.

const SVG = "http://www.w3.org/2000/svg";

function downloadPicture(strip, caption) {
  const text = new XMLSerializer().serializeToString(pictureOf(strip, caption));
  const link = element("a", { download: "attention.svg" });
  link.href = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function pictureOf(strip, caption) {
  const box = strip.element;
  const [width, height, top] = [box.scrollWidth, box.scrollHeight + 40, 32];
  const style = getComputedStyle(document.body);
  const svg = svgElement("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
  svg.append(
    svgElement("title", {}, caption),
    svgElement("rect", { width, height, fill: style.backgroundColor }),
    svgElement("text", { x: 8, y: 20, "font-size": 12, fill: style.color, "font-family": "sans-serif" }, caption),
  );
  for (const cell of strip.cells) svg.append(...tokenShapes(cell, top));
  return svg;
}

function tokenShapes(cell, top) {
  const [x, y, width, height] = [cell.offsetLeft, cell.offsetTop + top, cell.offsetWidth, cell.offsetHeight];
  const style = getComputedStyle(cell);
  const bar = cell.lastChild;
  const isMarked = cell.classList.contains("current");
  const box = {
    x, y, width, height, rx: 3,
    ...fillOf(style.backgroundColor),
    stroke: isMarked ? style.outlineColor : style.borderBottomColor,
    "stroke-width": isMarked ? 2 : 1,
  };
  if (cell.classList.contains("prompt")) box["stroke-dasharray"] = "2 2";
  const barHeight = bar.getBoundingClientRect().height;
  return [
    svgElement("rect", box),
    ...textLines(cell, x, y, style),
    svgElement("rect", {
      x: x + 2, y: y + height - 2 - barHeight, width: Math.max(0, width - 4), height: barHeight,
      fill: getComputedStyle(bar).backgroundColor,
    }),
  ];
}

// Not every program that reads SVG supports colours with an alpha channel.
function fillOf(colour) {
  const [red, green, blue, alpha = 1] = colour.match(/[\d.]+/g).map(Number);
  return { fill: `rgb(${red},${green},${blue})`, "fill-opacity": alpha };
}

// A token wider than the strip is wrapped in the browser; here it gets as many lines, of equal length.
function textLines(cell, x, y, style) {
  const isContinued = cell.classList.contains("continued");
  const characters = isContinued ? ["⋯"] : Array.from(cell.firstChild.textContent);
  const lineHeight = parseFloat(style.lineHeight);
  const nLines = Math.max(1, Math.round(cell.firstChild.offsetHeight / lineHeight));
  const perLine = Math.ceil(characters.length / nLines);
  return Array.from({ length: nLines }, (_, i) =>
    svgElement(
      "text",
      {
        x: x + 4, y: y + (i + 0.8) * lineHeight, "xml:space": "preserve",
        "font-family": "monospace", "font-size": style.fontSize,
        "font-style": style.fontStyle, "font-weight": style.fontWeight, fill: style.color,
      },
      characters.slice(i * perLine, (i + 1) * perLine).join(""),
    ),
  );
}

function svgElement(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}
