// The words of the page: numbers, names of tokens, and sentences about a row.

function percent(share) {
  const value = 100 * share;
  if (value === 0) return "0%";
  if (value < 0.1) return "<0.1%";
  return `${value < 9.95 ? value.toFixed(1) : Math.round(value)}%`;
}

// A share, or a signed number in the unit of its measure.
function valueText(value, scale) {
  return scale === null ? percent(value) : signed(value);
}

// The change of ln p, and the factor by which p changes.
function changeText(change) {
  const factor = Math.exp(change);
  const times = factor >= 10 || factor < 0.01 ? factor.toExponential(0) : factor.toPrecision(2);
  return `${signed(change)} (p × ${times})`;
}

function signed(value) {
  const digits = Math.abs(value).toFixed(2);
  if (digits === "0.00") return digits;
  return `${value < 0 ? "−" : "+"}${digits}`;
}

function tokenName(trace, position) {
  return `token ${position} “${trace.names[position]}”`;
}

function rowlessText(trace) {
  return trace.firstRow < trace.nPrompt ? "The first token has no row." : "Tokens of the prompt have no row in this trace.";
}

function stepText(trace, step) {
  const { logProbability, isGiven } = trace.steps[step];
  const position = trace.firstRow + step;
  const number = position - trace.nPrompt + 1;
  const kind = number < 1 ? "Prompt token" : isGiven ? `Token ${number}, given` : `Generated token ${number}`;
  return `${kind}, with probability ${percent(Math.exp(logProbability))} (ln p ${signed(logProbability)}).`;
}

function keptText({ kept }) {
  return kept === null ? "" : ` With the verified sources and the sink alone: ln p ${changeText(kept)}.`;
}

function listedText(trace, view, row, step) {
  if (view.measure === EFFECTS) {
    return "in nats, with one position hidden at a time. Plus: the position raised the token's probability; minus: it lowered it.";
  }
  const facts = factsOf(trace, view, step);
  const isSigned = trace.scales[view.measure] !== null;
  const kept = `the sink and the ${trace.nSources} strongest sources of each head, rounded`;
  const part = view.reduction === "traced" || hasWholeHeads(trace)
    ? "All positions are shaded; the table has the strongest."
    : isSigned ? `Listed: ${kept}.` : `Listed: ${percent(row.listed)} of the row (${kept}).`;
  if (isSigned) return signedText(trace, view, step, facts, part);
  if (!sumsToOne(view, facts)) return part;
  const isMean = view.reduction !== "traced" && headsOf(trace, view).length > 1;
  return (
    `${percent(facts.sink)} on the sink, ${percent(facts.own)} on the query's own position, ` +
    `${percent(facts.prompt)} on the prompt; ${isMean ? "mean entropy of the heads" : "entropy"} ${facts.entropy.toFixed(2)} bits, ` +
    `on average ${facts.distance.toFixed(1)} tokens back. ${part}`
  );
}

function signedText(trace, view, step, facts, part) {
  const row = trace.steps[step].rows[trace.measures.indexOf(view.measure)];
  const parts = view.reduction === "traced" ? row.parts : [];
  const others = parts.map(([name, value]) => `${name} ${signed(value)}`).join(", ");
  const whole = others && row.whole !== null ? ` From no position: ${others}; sum ${signed(row.whole)}.` : "";
  return (
    `${signed(facts.sink)} ${trace.units[view.measure]} from the sink, ${signed(facts.own)} from the query's own ` +
    `position, ${signed(facts.prompt)} from the prompt.${whole} ${part}`
  );
}

// A row of maxima over heads does not sum to 1.
function sumsToOne(view, facts) {
  return view.reduction !== "max" && Math.abs((facts.total ?? 1) - 1) < 0.001;
}

function gridText(position, most) {
  const where = position === null ? "mean over all rows" : `at token ${position}`;
  if (most === 0) return `Entropy in bits, ${where}: 0, because the row has a single position. Click a head to see its row.`;
  return `Entropy in bits, ${where}: 0 if all of the row is on one token, ${most.toFixed(1)} (strongest shade) if it is uniform. Click a head to see its row.`;
}

// Fills in the texts that never change.
function fillWords(trace) {
  setText("model", trace.model);
  byId("changed").hidden = !trace.changed;
  setText("changed", `The model was changed: ${trace.changed}.`);
  const facts = byId("facts");
  for (const [name, value] of trace.facts) facts.append(element("dt", {}, name), element("dd", {}, value));
  const footer = byId("footer");
  for (const sentence of trace.closing) footer.append(element("p", {}, sentence));
}
