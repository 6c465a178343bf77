// The state of the page, its event handlers and its drawing.

function byId(id) {
  return document.getElementById(id);
}

// Creates an element with attributes and text; nothing is ever parsed as HTML.
function element(name, attributes = {}, text = "") {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

// The exact effects of all positions: a measure without rows of heads.
const EFFECTS = "knockout";
const WIDE_TOKENS = 150; // above this number of tokens, the map has the full width

class Page {
  constructor(trace) {
    this.trace = trace;
    this.hasHeads = trace.nSources !== null;
    this.view = { measure: trace.measures[0], reduction: "traced", layer: null, head: null };
    this.showsReaders = false;
    this.pinned = null;
    this.pointed = trace.nTokens - 1;
    this.isDrawn = true;
    this.strip = makeStrip(trace, (at) => this.point(at), (at) => this.togglePin(at));
    makeCopying(trace, this.strip);
    this.map = makeMap(trace, (at) => this.pin(at));
    this.grid = makeGrid(trace, (layer, head) => this.chooseHead(layer, head));
    makeWorking(trace, () => this.changed());
    fillWords(trace);
    this.fillControls();
    this.listen();
    this.changed();
  }

  get current() {
    return this.pinned ?? this.pointed;
  }

  point(position) {
    if (this.pinned !== null || this.pointed === position) return;
    this.pointed = position;
    this.changed();
  }

  togglePin(position) {
    this.pinned = this.pinned === position ? null : position;
    this.pointed = position;
    this.changed();
  }

  // From the keyboard or the map: focus scrolls the token into view.
  pin(position) {
    const last = this.trace.nTokens - 1;
    this.pinned = this.pointed = Math.min(last, Math.max(0, position));
    this.draw();
    this.strip.cells[this.pinned].focus();
  }

  unpin() {
    this.pinned = null;
    this.changed();
  }

  // Choosing a head again deselects it.
  chooseHead(layer, head) {
    const isChosen = this.view.layer === layer && this.view.head === head;
    if (this.hasHeads) this.choose(isChosen ? { reduction: "traced" } : { layer, head });
  }

  // The reduction of the trace covers the heads that were traced; choosing others switches to mean.
  choose(change) {
    const view = Object.assign(this.view, change);
    if (change.measure !== EFFECTS) view.measure = this.headMeasure;
    if (change.measure === EFFECTS || change.reduction === "traced") {
      Object.assign(view, { reduction: "traced", layer: null, head: null });
    } else if (view.reduction === "traced" && (view.layer !== null || view.head !== null)) {
      view.reduction = "mean";
    }
    this.changed();
  }

  // Draws only once for several changes before the next frame.
  changed() {
    if (!this.isDrawn) return;
    this.isDrawn = false;
    requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.isDrawn = true;
    const { trace, current } = this;
    if (trace.nTokens === 0) return;
    const readers = this.showsReaders || current < trace.firstRow;
    markToken(this.strip, current, this.pinned !== null);
    this.drawControls();
    drawLegend(this.scale);
    if (readers) this.drawReaders(current);
    else this.drawSources(current);
    fillWorking(trace, this.view, current - trace.firstRow);
    drawChoices(trace, readers ? null : current - trace.firstRow);
    this.drawGrid(current);
    this.drawMap(current);
  }

  get scale() {
    return this.trace.scales[this.view.measure];
  }

  // The measure of the view, or the first one if the view has one without rows of heads.
  get headMeasure() {
    return this.view.measure === EFFECTS ? this.trace.measures[0] : this.view.measure;
  }

  drawMap(position) {
    const { trace, view } = this;
    byId("map-section").hidden = trace.steps.length === 0;
    if (trace.steps.length === 0) return;
    const key = JSON.stringify(view);
    if (this.mapped !== key) {
      this.mapped = key;
      fillMap(this.map, rowsOf(trace, view), this.scale);
      const isWhole = view.reduction === "traced" || hasWholeHeads(trace);
      const kept = isWhole ? "" : ` Only the sink and the ${trace.nSources} strongest sources of each head are known.`;
      setText("map-note", `${this.viewText()}: a line for each ${trace.firstRow < trace.nPrompt ? "token" : "generated token"}, a column for each earlier position.${kept}`);
      this.map.canvas.setAttribute("aria-label", `Map of ${this.viewText()}`);
      setText("map-readout", MAP_HINT);
    }
    markMap(this.map, position);
    if (this.hasHeads) fillSmallMaps(trace, this.grid, this.headMeasure);
  }

  drawSources(position) {
    const { trace, view } = this;
    const step = position - trace.firstRow;
    const rows = this.byMeasure((one) => rowOf(trace, one, step));
    const shares = mapValues(rows, (row) => row.shares);
    shadeStrip(trace, this.strip, shares[view.measure], this.scale);
    const name = tokenName(trace, position);
    this.caption = `${name}: ${this.viewText()}`;
    setText("token-title", this.scale === null ? `What ${name} attended to` : `What raised or lowered ${name}`);
    setText("token-facts", stepText(trace, step));
    const effects = effectsOf(trace, step);
    setText("knockout", effects ? `${trace.knockout}${keptText(trace.steps[step])}` : "");
    setText("listed", `${this.viewText()}: ${listedText(trace, view, rows[view.measure], step)}`);
    fillTable(trace, { shares, measure: view.measure, own: position - 1, effects });
  }

  drawReaders(position) {
    const { trace, view } = this;
    const shares = this.byMeasure((one) => columnOf(trace, one, position));
    shadeStrip(trace, this.strip, shares[view.measure], this.scale);
    const name = tokenName(trace, position);
    const title = this.scale === null ? `Tokens that attended to ${name}` : `What ${name} raised or lowered`;
    this.caption = `${title}: ${this.viewText()}`;
    setText("token-title", title);
    setText("token-facts", position < trace.firstRow ? rowlessText(trace) : "");
    setText("knockout", "");
    setText("listed", `${this.viewText()}: each number is from the row of that later token.`);
    fillTable(trace, { shares, measure: view.measure, own: null, effects: null });
  }

  drawGrid(position) {
    const { trace, view } = this;
    const step = position - trace.firstRow;
    const steps = step >= 0 ? [step] : Array.from(trace.steps.keys());
    markHeads(this.grid, view.reduction === "traced" ? [] : headsOf(trace, view));
    if (this.hasHeads) {
      const { bits, most } = entropiesOf(trace, this.headMeasure, steps);
      fillGrid(this.grid, bits, most);
      setText("grid-note", gridText(step >= 0 ? position : null, most));
    } else {
      fillGrid(this.grid, null, 0);
      setText("grid-note", "This trace has no rows of single heads, so their entropies are unknown.");
    }
  }

  byMeasure(rowsOf) {
    const shown = [...new Set([...this.trace.measures, this.view.measure])];
    const pairs = shown.map((measure) => [measure, rowsOf({ ...this.view, measure })]);
    return Object.fromEntries(pairs);
  }

  viewText() {
    const { measure, layer, head, reduction } = this.view;
    if (reduction === "traced") return this.trace.traced[measure];
    if (layer !== null && head !== null) return `${measure} of head ${layer}.${head}`;
    // As traced, norms are reduced before a row is normalized; here, each head has shares of its own.
    const what = this.scale !== null ? "sum of" : measure === "weight" ? `${reduction} of` : `${reduction} of the shares in`;
    const how = `${measure}, ${what}`;
    if (layer !== null) return `${how} the heads of layer ${layer}`;
    return head === null ? `${how} all heads` : `${how} head ${head} of every layer`;
  }

  fillControls() {
    const { trace } = this;
    if (trace.nTokens > WIDE_TOKENS) byId("columns").classList.add("has-wide-map");
    addOptions("measure", trace.choices.map((measure) => [measure, measure === EFFECTS ? "change of ln p" : measure]));
    addOptions("layer", numbered(trace.nLayer));
    addOptions("head", numbered(trace.nHead));
    const isSigned = trace.scales[trace.measures[0]] !== null;
    const ofHeads = isSigned ? [["mean", "sum of the heads"]] : [["mean", "mean of the heads"], ["max", "max of the heads"]];
    addOptions("reduction", [["traced", "as traced"], ...ofHeads]);
    byId("measure-label").hidden = trace.choices.length < 2;
    byId("no-heads").hidden = this.hasHeads;
    for (const id of ["layer", "head", "reduction"]) byId(id).disabled = !this.hasHeads;
    this.grid.element.hidden = !this.hasHeads && !trace.roles;
  }

  drawControls() {
    const { measure, layer, head, reduction } = this.view;
    byId("measure").value = measure;
    byId("layer").value = layer ?? "";
    byId("head").value = head ?? "";
    byId("reduction").value = reduction;
    byId("direction").value = this.showsReaders ? "readers" : "sources";
  }

  listen() {
    const onChange = (id, apply) => byId(id).addEventListener("change", (e) => apply(e.target.value));
    onChange("measure", (measure) => this.choose({ measure }));
    onChange("layer", (text) => this.choose({ layer: text === "" ? null : Number(text) }));
    onChange("head", (text) => this.choose({ head: text === "" ? null : Number(text) }));
    onChange("reduction", (reduction) => this.choose({ reduction }));
    onChange("direction", (direction) => {
      this.showsReaders = direction === "readers";
      this.changed();
    });
    const download = () => downloadPicture(this.strip, `${this.trace.model}. ${this.caption}`);
    byId("download").addEventListener("click", download);
    byId("help-button").addEventListener("click", toggleHelp);
    document.addEventListener("keydown", (event) => this.press(event));
    for (const query of ["print", "(prefers-color-scheme: dark)"]) {
      matchMedia(query).addEventListener("change", () => this.repaint());
    }
  }

  // Maps are pictures: paper and another theme need other colours. Printing does not wait for timers.
  repaint() {
    this.map.image = this.grid.drawn = null;
    paintMap(this.map);
    if (this.hasHeads) fillSmallMaps(this.trace, this.grid, this.headMeasure, Infinity);
  }

  press(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Escape") this.unpin();
    else if (event.key === "?") toggleHelp();
    else if (this.strip.element.contains(event.target) || event.target === document.body) {
      this.move(event);
    }
  }

  move(event) {
    const { current, strip, trace } = this;
    const targets = {
      ArrowLeft: () => current - 1,
      ArrowRight: () => current + 1,
      ArrowUp: () => tokenOnLine(strip, current, -1),
      ArrowDown: () => tokenOnLine(strip, current, 1),
      Home: () => 0,
      End: () => trace.nTokens - 1,
      Enter: () => current,
    };
    const target = targets[event.key];
    if (!target || trace.nTokens === 0) return;
    event.preventDefault();
    this.pin(target());
  }
}

function mapValues(object, change) {
  return Object.fromEntries(Object.entries(object).map(([key, value]) => [key, change(value)]));
}

function setText(id, text) {
  byId(id).textContent = text;
}

function addOptions(id, options) {
  for (const [value, text] of options) byId(id).append(element("option", { value }, text));
}

function numbered(n) {
  return [["", "all"], ...Array.from({ length: n }, (_, i) => [String(i), String(i)])];
}

function toggleHelp() {
  const help = byId("help");
  help.hidden = !help.hidden;
  byId("help-button").setAttribute("aria-expanded", String(!help.hidden));
}

readTrace()
  .then((trace) => new Page(trace))
  .catch((error) => {
    setText("token-title", `This page could not be drawn: ${error.message}`);
    throw error;
  });
