// The rows that a view shows. A view is {measure, reduction, layer, head}. The reduction "traced" is
// that of the trace, whose rows are complete. "mean" and "max" reduce over the heads that layer and
// head select (null selects all). For single heads, the trace may have only the sink and the strongest
// sources. A signed measure is summed over heads, never averaged.

// The row of every step, as arrays of numbers.
function rowsOf(trace, view) {
  return trace.steps.map((_, step) => rowOf(trace, view, step).shares);
}

function rowOf(trace, view, step) {
  return view.reduction === "traced" ? tracedRow(trace, view, step) : headsRow(trace, view, step);
}

// Both return {shares, listed}: a share for each token in view, and their sum as a share of the row.
function tracedRow(trace, view, step) {
  const codes = trace.arrays[`${view.measure}.rows`];
  const start = trace.rowStarts[step];
  const shares = new Float32Array(trace.firstRow + step);
  const scale = trace.scales[view.measure];
  for (let i = 0; i < shares.length; i++) shares[i] = decoded(codes[start + i], 65535, scale);
  return { shares, listed: 1 };
}

function headsRow(trace, view, step) {
  const heads = headsOf(trace, view);
  const shares = new Float32Array(trace.firstRow + step);
  // Signed numbers add up over heads; shares are averaged, or their maximum is taken.
  const isSigned = trace.scales[view.measure] !== null;
  const part = isSigned ? 1 : 1 / heads.length;
  const isMax = view.reduction === "max" && !isSigned;
  let listed = 0;
  for (const head of heads) {
    eachKept(trace, view.measure, step, head, (position, share) => {
      listed += share;
      if (isMax) shares[position] = Math.max(shares[position], share);
      else shares[position] += share * part;
    });
  }
  return { shares, listed: Math.min(1, listed / heads.length) };
}

function headsOf(trace, view) {
  const heads = [];
  for (let layer = 0; layer < trace.nLayer; layer++) {
    for (let head = 0; head < trace.nHead; head++) {
      const isChosen =
        (view.layer === null || view.layer === layer) && (view.head === null || view.head === head);
      if (isChosen) heads.push(layer * trace.nHead + head);
    }
  }
  return heads;
}

// Whether the rows of single heads are complete, as for a short text or with --dense.
function hasWholeHeads(trace) {
  return trace.nSources + 1 >= trace.firstRow + trace.steps.length - 1;
}

function eachKept(trace, measure, step, head, visit) {
  const row = step * trace.nLayer * trace.nHead + head;
  const positions = trace.arrays[`${measure}.positions`];
  const weights = trace.arrays[`${measure}.weights`];
  const scale = trace.scales[measure];
  visit(trace.sink, decoded(trace.arrays[`${measure}.sink`][row], 255, scale));
  const end = (row + 1) * trace.nSources;
  for (let i = row * trace.nSources; i < end; i++) {
    const value = decoded(weights[i], 255, scale);
    if (value !== 0) visit(positions[i], value);
  }
}

// The weight of a token in the row of each later token, as an array over all tokens.
function columnOf(trace, view, position) {
  const shares = new Float32Array(trace.nTokens);
  for (let step = Math.max(0, position + 1 - trace.firstRow); step < trace.steps.length; step++) {
    shares[trace.firstRow + step] = shareAt(trace, view, step, position);
  }
  return shares;
}

function shareAt(trace, view, step, position) {
  if (view.reduction !== "traced") return headsRow(trace, view, step).shares[position];
  const code = trace.arrays[`${view.measure}.rows`][trace.rowStarts[step] + position];
  return decoded(code, 65535, trace.scales[view.measure]);
}

// {sink, own, prompt, entropy, distance} of a row, averaged over the heads of the view.
function factsOf(trace, view, step) {
  if (view.reduction === "traced") {
    return trace.steps[step].rows[trace.measures.indexOf(view.measure)];
  }
  const heads = headsOf(trace, view);
  const facts = {};
  for (const name of ["sink", "own", "prompt", "entropy", "distance"]) {
    const all = heads.map((head) => headFact(trace, view.measure, name, step, head));
    const isSum = trace.scales[view.measure] !== null && ["sink", "own", "prompt"].includes(name);
    facts[name] = all.reduce((sum, value) => sum + value, 0) / (isSum ? 1 : heads.length);
  }
  return facts;
}

function headFact(trace, measure, name, step, head) {
  const row = step * trace.nLayer * trace.nHead + head;
  const code = trace.arrays[`${measure}.${name}`][row];
  if (name === "entropy") return byteShare(code) * mostBits(trace, step);
  if (name === "distance") return byteShare(code) * (trace.firstRow + step - 1);
  return decoded(code, 255, trace.scales[measure]);
}

function mostBits(trace, step) {
  return Math.log2(Math.max(1, trace.firstRow + step));
}

// The entropy of each head and its maximum possible value, in bits, averaged over steps.
function entropiesOf(trace, measure, steps) {
  const codes = trace.arrays[`${measure}.entropy`];
  const nHeads = trace.nLayer * trace.nHead;
  const bits = new Float64Array(nHeads);
  let most = 0;
  for (const step of steps) {
    const stepBits = mostBits(trace, step);
    most += stepBits / steps.length;
    for (let head = 0; head < nHeads; head++) {
      bits[head] += (byteShare(codes[step * nHeads + head]) * stepBits) / steps.length;
    }
  }
  return { bits, most };
}
