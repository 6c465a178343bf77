// The most probable tokens at a step, and the predictions after each layer.

// step: that of the current token, or null for none.
function drawChoices(trace, step) {
  const shown = step === null ? null : trace.steps[step];
  fillCandidates(shown?.candidates ?? []);
  fillLens(shown?.lens ?? null);
}

function fillCandidates(candidates) {
  byId("candidates-section").hidden = candidates.length === 0;
  byId("candidates").replaceChildren(...candidates.map(candidateRow));
}

function candidateRow(candidate) {
  const row = element("tr");
  row.append(candidateName(candidate), shareCell(candidate.probability, null));
  row.append(element("td", { class: "quiet" }, candidate.isChosen ? "this token" : ""));
  return row;
}

function candidateName({ name, isChosen }) {
  const cell = element("td", { class: isChosen ? "name generated" : "name" });
  cell.append(element("span", { class: "text" }, name));
  return cell;
}

function fillLens(lens) {
  byId("lens-section").hidden = lens === null;
  if (lens === null) return;
  setText("lens-note", lens.layer === null
    ? "Another token is the first choice after the last layer."
    : `This token is the first choice from layer ${lens.layer} on.`);
  // The last layer is on top, as in papers.
  const rows = lens.probabilities.map((probability, layer) => lensRow(lens, probability, layer));
  byId("lens").replaceChildren(...rows.reverse());
}

function lensRow({ top }, probability, layer) {
  const row = element("tr");
  row.append(element("th", { scope: "row" }, String(layer)), shareCell(probability, null));
  const cell = element("td", { class: "name" });
  for (const candidate of top[layer]) {
    const kind = candidate.isChosen ? "text chosen" : "text";
    cell.append(element("span", { class: kind, title: percent(candidate.probability) }, candidate.name), " ");
  }
  row.append(cell);
  return row;
}
