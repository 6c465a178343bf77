"use strict";

// Reading the trace that is embedded in the page: JSON, with arrays packed into deflated bytes.

async function readTrace() {
  const trace = JSON.parse(byId("trace").textContent);
  const { arrays, deflated } = trace.packed;
  trace.arrays = unpackArrays(arrays, await inflate(deflated));
  trace.nTokens = trace.names.length;
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

// Index of each step's first number: a row has one for each token before the generated one.
function rowStarts(trace) {
  const starts = [0];
  for (let step = 0; step < trace.steps.length; step++) {
    starts.push(starts[step] + trace.firstRow + step);
  }
  return starts;
}

// Decodes a number. Both encodings have finer steps for small numbers: a share is (c / most)^2;
// a signed number is scale (c - m) |c - m| / (m - 1)^2, with m = (most + 1) / 2.
function decoded(code, most, scale) {
  if (scale === null) return (code / most) ** 2;
  const middle = (most + 1) / 2;
  const root = (code - middle) / (middle - 1);
  return scale * root * Math.abs(root);
}

function byteShare(code) {
  return decoded(code, 255, null);
}

// The intensity with which a number is drawn, from -1 to 1: the root, so that a few percent are visible.
function levelOf(value, scale) {
  const part = Math.min(1, Math.abs(value) / (scale ?? 1));
  return Math.sign(value) * Math.sqrt(part);
}

// Isolates the direction of a name, so that a number next to Arabic or Hebrew stays in place.
function isolated(name) {
  return `\u2068${name}\u2069`;
}
