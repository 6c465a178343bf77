// The rows that a view shows. A view is {measure, reduction, layer, head}. The reduction "traced" is
// that of the trace, whose rows are complete; "mean" and "max" combine the heads selected by layer
// and head (null selects all), of which only the sink and the strongest sources are known.

function rowOf(trace, view, step) {
  return view.reduction === "traced" ? tracedRow(trace, view, step) : headsRow(trace, view, step);
}

// Both return {shares, listed}: a share for each token in view, and their sum as a share of the row.
function tracedRow(trace, view, step) {
  const codes = trace.arrays[`${view.measure}.rows`];
  const start = trace.rowStarts[step];
  const shares = new Float32Array(trace.nPrompt + step);
  for (let i = 0; i < shares.length; i++) shares[i] = wordShare(codes[start + i]);
  return { shares, listed: 1 };
}

function headsRow(trace, view, step) {
  const heads = headsOf(trace, view);
  const shares = new Float32Array(trace.nPrompt + step);
  let listed = 0;
  for (const head of heads) {
    eachKept(trace, view.measure, step, head, (position, share) => {
      listed += share;
      if (view.reduction === "max") shares[position] = Math.max(shares[position], share);
      else shares[position] += share / heads.length;
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

function eachKept(trace, measure, step, head, take) {
  const row = step * trace.nLayer * trace.nHead + head;
  const positions = trace.arrays[`${measure}.positions`];
  const weights = trace.arrays[`${measure}.weights`];
  take(trace.sink, byteShare(trace.arrays[`${measure}.sink`][row]));
  const end = (row + 1) * trace.nSources;
  for (let i = row * trace.nSources; i < end; i++) {
    if (weights[i]) take(positions[i], byteShare(weights[i]));
  }
}

// The weight of a token in the row of each later token: a share for each token of the trace.
function columnOf(trace, view, position) {
  const shares = new Float32Array(trace.nTokens);
  for (let step = Math.max(0, position + 1 - trace.nPrompt); step < trace.steps.length; step++) {
    shares[trace.nPrompt + step] = shareAt(trace, view, step, position);
  }
  return shares;
}

function shareAt(trace, view, step, position) {
  if (view.reduction !== "traced") return headsRow(trace, view, step).shares[position];
  return wordShare(trace.arrays[`${view.measure}.rows`][trace.rowStarts[step] + position]);
}

// {sink, own, prompt, entropy, distance} of a row; the mean over several heads.
function factsOf(trace, view, step) {
  if (view.reduction === "traced") {
    return trace.steps[step].rows[trace.measures.indexOf(view.measure)];
  }
  const heads = headsOf(trace, view);
  const facts = {};
  for (const name of ["sink", "own", "prompt", "entropy", "distance"]) {
    const all = heads.map((head) => headFact(trace, view.measure, name, step, head));
    facts[name] = all.reduce((sum, value) => sum + value, 0) / heads.length;
  }
  return facts;
}

function headFact(trace, measure, name, step, head) {
  const row = step * trace.nLayer * trace.nHead + head;
  const value = byteShare(trace.arrays[`${measure}.${name}`][row]);
  if (name === "entropy") return value * mostBits(trace, step);
  if (name === "distance") return value * (trace.nPrompt + step - 1);
  return value;
}

function mostBits(trace, step) {
  return Math.log2(Math.max(1, trace.nPrompt + step));
}

// The entropy of each head and the largest possible one, in bits; the mean over several steps.
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
