// How a weight is computed: the dot product of a query and a key, the softmax, and the weighted sum of
// the values of one head, with the model's own numbers.

function makeWorking(trace, onChoose) {
  const select = byId("working-head");
  for (const [i, { layer, head }] of trace.workings.entries()) {
    select.append(element("option", { value: i }, `${layer}.${head}`));
  }
  byId("working-section").hidden = trace.workings.length === 0;
  select.addEventListener("change", onChoose);
  const source = byId("working-source");
  source.addEventListener("change", () => {
    source.dataset.chosen = source.value;
    onChoose();
  });
  byId("sources").addEventListener("click", (event) => {
    const position = event.target.closest("tr")?.dataset.position;
    if (position === undefined || trace.workings.length === 0) return;
    source.dataset.chosen = position;
    onChoose();
  });
}

// Shows the head and source that were chosen last, or the view's head if the view has a single one.
function fillWorking(trace, view, step) {
  if (trace.workings.length === 0) return;
  const hasRow = step >= 0;
  byId("working").hidden = !hasRow;
  setText("working-note", hasRow
    ? "Every number is recomputed here from the model's own queries, keys and values."
    : "This token has no row.");
  if (!hasRow) return;
  const select = byId("working-head");
  const ofView = trace.workings.findIndex(({ layer, head }) => layer === view.layer && head === view.head);
  if (ofView >= 0) select.value = String(ofView);
  const working = worked(trace, Number(select.value), trace.firstRow + step - 1);
  const source = chosenSource(trace, working);
  drawScores(trace, working, source);
  drawTerms(trace, working, source);
  drawSums(trace, working, source);
}

// The row of a query: {query, first, scores, exponentials, total, weights}, for positions from first on.
function worked(trace, index, query) {
  const { scale, window } = trace.workings[index];
  const queryVector = workingVector(trace, index, "queries", query);
  const first = window === 0 ? 0 : Math.max(0, query - window + 1);
  const scores = [];
  for (let position = first; position <= query; position++) {
    const key = workingVector(trace, index, "keys", position);
    scores.push(dot(queryVector, key) * scale);
  }
  const largest = Math.max(...scores);
  const exponentials = scores.map((score) => Math.exp(score - largest));
  const total = exponentials.reduce((sum, value) => sum + value, 0);
  const weights = exponentials.map((value) => value / total);
  return { index, query, first, scale, scores, largest, exponentials, total, weights };
}

function workingVector(trace, index, name, position) {
  const bits = trace.arrays[`working${index}.${name}`];
  const numbers = new Float32Array(bits.buffer, bits.byteOffset, bits.length);
  return numbers.subarray(position * trace.dHead, (position + 1) * trace.dHead);
}

function dot(one, other) {
  return one.reduce((sum, value, i) => sum + value * other[i], 0);
}

// Offers the positions in view; the default is the strongest one except the sink.
function chosenSource(trace, { first, query, weights }) {
  const select = byId("working-source");
  const wanted = Number(select.dataset.chosen ?? -1);
  const options = weights.map((weight, i) =>
    element("option", { value: first + i }, `${first + i} ${isolated(trace.names[first + i])} (${percent(weight)})`));
  select.replaceChildren(...options);
  let strongest = query;
  for (const [i, weight] of weights.entries()) {
    const isStronger = weight > weights[strongest - first] && first + i !== trace.sink;
    if (isStronger) strongest = first + i;
  }
  const source = first <= wanted && wanted <= query ? wanted : strongest;
  select.value = String(source);
  return source;
}

function drawScores(trace, working, source) {
  const { query, first, scale, scores, largest, exponentials, total, weights } = working;
  const i = source - first;
  const pair = `query of ${tokenName(trace, query)}, key of ${tokenName(trace, source)}`;
  const rows = [
    ["query · key", `the sum of the ${trace.dHead} products below: ${pair}`, scores[i] / scale],
    ["score", `times the scale ${digits(scale)}`, scores[i]],
    ["e^(score − largest)", `the largest score of the ${weights.length} positions in view is ${digits(largest)}`, exponentials[i]],
    ["sum", "the sum of these exponentials over all positions in view", total],
    ["weight", "the exponential divided by the sum: the softmax", weights[i]],
  ];
  const made = rows.map(([name, text, value]) => {
    const row = element("tr");
    row.append(element("th", { scope: "row" }, name), element("td", { class: "number" }, digits(value)));
    row.append(element("td", { class: "quiet" }, text));
    return row;
  });
  byId("working-scores").replaceChildren(...made);
}

function drawTerms(trace, { index, query, first, weights }, source) {
  const vectors = {
    query: workingVector(trace, index, "queries", query),
    key: workingVector(trace, index, "keys", source),
    value: workingVector(trace, index, "values", source),
    output: outputOf(trace, index, first, weights),
  };
  const weight = weights[source - first];
  const rows = Array.from({ length: trace.dHead }, (_, d) => {
    const row = element("tr");
    row.append(element("th", { scope: "row" }, String(d)));
    const { query: q, key, value, output } = vectors;
    const numbers = [q[d], key[d], q[d] * key[d], value[d], weight * value[d], output[d]];
    for (const number of numbers) row.append(element("td", { class: "number" }, digits(number)));
    return row;
  });
  byId("working-terms").replaceChildren(...rows);
}

// The head's output: the sum of the values of all positions in view times their weights.
function outputOf(trace, index, first, weights) {
  const output = new Float64Array(trace.dHead);
  for (const [i, weight] of weights.entries()) {
    const value = workingVector(trace, index, "values", first + i);
    for (let d = 0; d < trace.dHead; d++) output[d] += weight * value[d];
  }
  return output;
}

function drawSums(trace, { first, weights }, source) {
  const text =
    `The last three columns: the value of position ${source}, this value times the weight ` +
    `${digits(weights[source - first])}, and the output of the head, which is the sum of the ` +
    `weighted values of all ${weights.length} positions in view.`;
  setText("working-sums", text);
}

function digits(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e5 || size < 1e-4 ? size.toExponential(3) : size.toPrecision(4);
  return value < 0 ? `−${text}` : text;
}
