// Copying from the strip gives the plain text, without the marks for spaces and line breaks.

function makeCopying(trace, strip) {
  document.addEventListener("copy", (event) => {
    const cells = selectedCells(strip);
    if (cells === null) return;
    event.clipboardData.setData("text/plain", cells.map((position) => trace.plain[position]).join(""));
    event.preventDefault();
  });
  byId("copy").addEventListener("click", () => {
    strip.cells[strip.marked]?.focus({ preventScroll: true });
    document.getSelection().removeAllRanges();
    setText("copied", document.execCommand("copy") ? "Copied." : "Could not copy. Select the tokens, and copy them.");
    setTimeout(() => setText("copied", ""), 4000);
  });
}

// The positions of the selected tokens: all if nothing is selected but a token has the focus, null if
// the selection is elsewhere.
function selectedCells(strip) {
  const selection = document.getSelection();
  const all = Array.from(strip.cells.keys());
  if (selection.isCollapsed) return strip.element.contains(document.activeElement) ? all : null;
  const isInside = (node) => strip.element.contains(node);
  if (!isInside(selection.anchorNode) || !isInside(selection.focusNode)) return null;
  return all.filter((position) => selection.containsNode(strip.cells[position], true));
}
