// The grid of layers and heads: each head's entropy at the current token, and its role.

function makeGrid(trace, onChoose) {
  const table = byId("grid");
  const cells = [];
  table.append(columnNumbers(trace.nHead));
  for (let layer = 0; layer < trace.nLayer; layer++) {
    const row = element("tr", { role: "row" });
    row.append(element("th", { scope: "row" }, String(layer)));
    for (let head = 0; head < trace.nHead; head++) {
      const cell = headCell(trace, layer, head);
      cell.addEventListener("click", () => onChoose(layer, head));
      cells.push(cell);
      row.append(cell);
    }
    table.append(row);
  }
  cells[0].tabIndex = 0;
  table.style.setProperty("--n-head", trace.nHead);
  const grid = { element: table, cells, nHead: trace.nHead };
  table.addEventListener("keydown", (event) => moveInGrid(grid, event));
  describeRoles(trace);
  return grid;
}

function columnNumbers(nHead) {
  const row = element("tr", { role: "row" });
  row.append(element("td", {}));
  for (let head = 0; head < nHead; head++) {
    row.append(element("th", { scope: "col" }, String(head)));
  }
  return row;
}

function headCell(trace, layer, head) {
  const cell = element("td", { role: "gridcell", tabindex: "-1", "aria-selected": "false" });
  const role = trace.roles?.[layer][head];
  cell.append(element("canvas", { width: 1, height: 1 }), element("span", { class: "entropy" }));
  if (role) {
    cell.append(element("span", { class: "tag" }, role.tag));
    if (role.kind) cell.classList.add(`role-${role.kind}`);
  }
  cell.dataset.name = `head ${layer}.${head}`;
  cell.dataset.role = role ? roleText(role) : "";
  return cell;
}

function roleText(role) {
  const scores = Object.entries(role.scores).map(([name, score]) => `${name} ${percent(score)}`);
  return `${role.tag || "no role"} (${scores.join(", ")})`;
}

// bits: the entropy of each head, or null if unknown; most: the largest possible entropy.
function fillGrid(grid, bits, most) {
  for (const [i, cell] of grid.cells.entries()) {
    const text = bits === null ? "" : bits[i].toFixed(1);
    const parts = [cell.dataset.name, text && `entropy ${text} bits`, cell.dataset.role];
    const title = parts.filter(Boolean).join(", ");
    if (cell.title === title) continue;
    cell.title = title;
    cell.setAttribute("aria-label", title);
    cell.querySelector(".entropy").textContent = text;
    cell.style.setProperty("--level", bits === null ? 0 : (bits[i] / (most || 1)).toFixed(3));
  }
}

// Marks the chosen heads, unless all are chosen.
function markHeads(grid, heads) {
  const chosen = new Set(heads.length < grid.cells.length ? heads : []);
  for (const [i, cell] of grid.cells.entries()) {
    cell.classList.toggle("chosen", chosen.has(i));
    cell.setAttribute("aria-selected", String(chosen.has(i)));
  }
}

function moveInGrid(grid, event) {
  const here = grid.cells.indexOf(document.activeElement);
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    grid.cells[here]?.click();
    return;
  }
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -grid.nHead, ArrowDown: grid.nHead };
  const next = grid.cells[here + steps[event.key]];
  if (here < 0 || !next) return;
  event.preventDefault();
  grid.cells[here].tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function describeRoles(trace) {
  const legend = byId("role-legend");
  if (!trace.roles) {
    legend.textContent = "This trace has no head roles.";
    return;
  }
  for (const [kind, meaning] of trace.roleMeanings) {
    legend.append(element("span", { class: `role-name role-${kind}` }, kind), ` ${meaning} `);
  }
}
