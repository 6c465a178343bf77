"use strict";

// Reading the trace that is embedded in the page: JSON, with arrays packed into deflated bytes.

async function readTrace() {
  const trace = JSON.parse(document.getElementById("trace").textContent);
  const { arrays, deflated } = trace.packed;
  trace.arrays = unpackArrays(arrays, await inflate(deflated));
  trace.nTokens = trace.tokens.length;
  trace.rowStarts = rowStarts(trace);
  return trace;
}

async function inflate(base64) {
  const characters = atob(base64);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Each array is stored as the first bytes of all its numbers, then all second bytes, and so on.
function unpackArrays(arrays, bytes) {
  const unpacked = {};
  let start = 0;
  for (const [name, width, length] of arrays) {
    unpacked[name] = unpackArray(bytes, start, width, length);
    start += width * length;
  }
  return unpacked;
}

function unpackArray(bytes, start, width, length) {
  const kinds = { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array };
  const values = new kinds[width](length);
  for (let byte = 0; byte < width; byte++) {
    const plane = start + byte * length;
    for (let i = 0; i < length; i++) values[i] |= bytes[plane + i] << (8 * byte);
  }
  return values;
}

// Index of each step's first share: a row has a share for each token before the generated one.
function rowStarts(trace) {
  const starts = [0];
  for (let step = 0; step < trace.steps.length; step++) {
    starts.push(starts[step] + trace.nPrompt + step);
  }
  return starts;
}

// A code c stands for (c / m)^2, m being its largest value, so that small shares have finer steps.
function byteShare(code) {
  return (code / 255) ** 2;
}

function wordShare(code) {
  return (code / 65535) ** 2;
}
