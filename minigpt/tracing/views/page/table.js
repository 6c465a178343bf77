// The table of the strongest sources of a token, or of the tokens that attended to it most.

const MOST_ROWS = 12;
const QUERY_HINT = "The position whose query predicted the token: the row is the attention of this query.";

// The effects of a step: a list, a function of the position if all were knocked out, or null.
function effectsOf(trace, step) {
  const view = { measure: EFFECTS, reduction: "traced" };
  if (trace.choices.includes(EFFECTS)) return (position) => -shareAt(trace, view, step, position);
  const { effects } = trace.steps[step];
  return effects.length ? effects : null;
}

// parts: {shares by measure, measure to sort by, own: the query's position or null, effects or null}.
function fillTable(trace, parts) {
  const table = byId("sources");
  table.tHead.replaceChildren(headingRow(trace, parts));
  const rows = strongest(parts).map((position) => tableRow(trace, parts, position));
  table.tBodies[0].replaceChildren(...rows);
  table.hidden = rows.length === 0;
}

function strongest({ shares, measure, effects }) {
  const main = shares[measure];
  const positions = Array.from(main.keys()).filter((position) => main[position] !== 0);
  positions.sort((a, b) => Math.abs(main[b]) - Math.abs(main[a]) || a - b);
  const kept = positions.slice(0, MOST_ROWS);
  const verified = (Array.isArray(effects) ? effects : []).map((effect) => effect.position);
  return kept.concat(verified.filter((position) => !kept.includes(position)));
}

function headingRow(trace, { effects }) {
  const row = element("tr");
  const titles = ["at", "token", ...trace.measures];
  if (effects) titles.push("without it, ln p");
  if (Array.isArray(effects)) titles.push("control, ln p");
  for (const title of titles) row.append(element("th", { scope: "col" }, title));
  return row;
}

function tableRow(trace, { shares, effects, own }, position) {
  const row = element("tr", { "data-position": position });
  row.append(element("td", { class: "number" }, String(position)), nameCell(trace, position, own));
  for (const measure of trace.measures) row.append(shareCell(shares[measure][position] ?? 0, trace.scales[measure]));
  if (effects) row.append(...effectCells(trace, effects, position));
  return row;
}

function nameCell(trace, position, own) {
  const isPrompt = position < trace.nPrompt;
  const cell = element("td", { class: isPrompt ? "name prompt" : "name generated" });
  cell.append(element("span", { class: "text", title: bytesText(trace, position) }, trace.names[position]));
  if (position === trace.sink) cell.append(element("span", { class: "kind" }, "sink"));
  if (position === own) cell.append(element("span", { class: "kind", title: QUERY_HINT }, "query"));
  return cell;
}

function shareCell(share, scale) {
  const cell = element("td", { class: "number share" }, valueText(share, scale));
  const part = scale === null ? share : Math.abs(share) / scale;
  cell.style.setProperty("--share", Math.min(1, part).toFixed(4));
  shade(cell, share, scale);
  return cell;
}

function effectCells(trace, effects, position) {
  if (!Array.isArray(effects)) {
    return [element("td", { class: "number effect" }, changeText(effects(position)))];
  }
  const effect = effects.find((candidate) => candidate.position === position);
  if (!effect) return [element("td"), element("td")];
  const source = element("td", { class: "number effect" }, changeText(effect.change));
  if (effect.control === null) return [source, element("td", {}, "none")];
  const control = element("td", { class: "number" }, `${signed(effect.controlChange)} (at ${effect.control})`);
  control.title = trace.names[effect.control];
  return [source, control];
}
