"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, attributes = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), attributes);
    element.append(...children);
    return element;
  };
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const COLORS = 10;
  const marks = all("symbol path").map((path) => path.getAttribute("d"));
  const mark = (group) => Math.floor(group / COLORS) % marks.length;
  const redraws = [];
  let chosen = null;

  // One cluster is chosen on the whole page: everything else dims.
  function choose(group) {
    chosen = group === chosen ? null : group;
    for (const element of all("[data-group]"))
      element.classList.toggle("dim", chosen !== null && Number(element.dataset.group) !== chosen);
    for (const button of all("[data-pick]"))
      button.setAttribute("aria-pressed", String(Number(button.dataset.pick) === chosen));
    const bar = document.getElementById("chosen");
    bar.hidden = chosen === null;
    bar.firstElementChild.textContent = chosen === null ? "" : `Cluster ${chosen} is chosen.`;
    redraws.forEach((draw) => draw());
  }
  for (const button of all("[data-pick]"))
    button.addEventListener("click", () => choose(Number(button.dataset.pick)));
  document.querySelector("#chosen button").addEventListener("click", () => choose(null));
  document.addEventListener("keydown", (event) => event.key === "Escape" && choose(null));

  // Tables: sorted by their headings, filtered by words, downloaded as csv.
  const text = (cell) => cell.textContent.trim().replaceAll("\u00a0", " ");
  const key = (cell) => (cell.dataset.sort === undefined ? text(cell) : cell.dataset.sort);
  const quoted = (value) => (/[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);

  function sortBy(table, heading, index) {
    const order = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    all("th", table).forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].map((row) => [key(row.cells[index]), row]);
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === ""); // empty cells stay last
      const gap = Number(a) - Number(b);
      return order * (Number.isNaN(gap) ? a.localeCompare(b, "en", { numeric: true }) : gap);
    };
    table.tBodies[0].append(...rows.sort((a, b) => compare(a[0], b[0])).map((pair) => pair[1]));
  }

  function download(table) {
    const shown = [...table.rows].filter((row) => !row.hidden);
    const lines = shown.map((row) => [...row.cells].map((cell) => quoted(key(cell))).join(","));
    const link = make("a", {
      href: URL.createObjectURL(new Blob([lines.join("\r\n") + "\r\n"], { type: "text/csv" })),
      download: `${table.dataset.name}.csv`,
    });
    link.click();
    URL.revokeObjectURL(link.href);
  }

  for (const table of all("table")) {
    all("th", table).forEach((heading, index) => {
      const button = make("button", { type: "button" }, ...heading.childNodes);
      button.addEventListener("click", () => sortBy(table, heading, index));
      heading.append(button);
    });
    const region = table.closest(".table"), name = region.getAttribute("aria-label");
    const rows = [...table.tBodies[0].rows], tools = make("div", { className: "tools" });
    if (rows.length > 5) {
      const count = make("span", { className: "count", ariaLive: "polite" });
      const field = make("input", { type: "search", ariaLabel: `Filter: ${name}` });
      field.addEventListener("input", () => {
        const words = field.value.toLowerCase().split(/\s+/);
        for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
        count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
      });
      tools.append(make("label", {}, "Filter", field), count);
    }
    const button = make("button", { type: "button", ariaLabel: `Download as csv: ${name}` }, "Download csv");
    button.addEventListener("click", () => download(table));
    tools.append(button);
    region.before(tools);
  }

  // What scrolls is a focus stop, and nothing else of its kind.
  function scrollers() {
    for (const box of all(".table, .picture"))
      if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
  }
  addEventListener("resize", scrollers);
  all("details").forEach((details) => details.addEventListener("toggle", scrollers));
  scrollers();

  // Maps.
  const nice = (low, high) => {
    const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power, ticks = [];
    for (let k = Math.ceil(low / step); k * step <= high; k++) ticks.push(Number((k * step).toPrecision(12)));
    return ticks;
  };

  function draw(figure, data, state) {
    const canvas = figure.querySelector("canvas"), pen = canvas.getContext("2d"), ratio = devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    [canvas.width, canvas.height] = [width * ratio, height * ratio];
    pen.scale(ratio, ratio);
    const box = { left: 58, top: 10, width: width - 72, height: height - 56 };
    const [across, up] = state.axes.map((index) => data.axes[index]);
    state.places = across.values.map((value, i) => [
      box.left + (value / 10000) * box.width, box.top + (1 - up.values[i] / 10000) * box.height]);
    const [ink, line, muted, behind] = ["--ink", "--line", "--muted", "--page"].map(color);
    pen.font = "12px system-ui, sans-serif";
    pen.textAlign = "center";
    for (const tick of nice(across.low, across.high)) {
      const x = box.left + ((tick - across.low) / (across.high - across.low)) * box.width;
      pen.fillStyle = line; pen.fillRect(x, box.top, 1, box.height);
      pen.fillStyle = ink; pen.fillText(tick, x, box.top + box.height + 18);
    }
    pen.textAlign = "right";
    for (const tick of nice(up.low, up.high)) {
      const y = box.top + (1 - (tick - up.low) / (up.high - up.low)) * box.height;
      pen.fillStyle = line; pen.fillRect(box.left, y, box.width, 1);
      pen.fillStyle = ink; pen.fillText(tick, box.left - 6, y + 4);
    }
    pen.textAlign = "center";
    pen.fillText(across.name, box.left + box.width / 2, height - 6, width - 20);
    pen.save(); pen.translate(12, box.top + box.height / 2); pen.rotate(-Math.PI / 2);
    pen.fillText(up.name, 0, 0, box.height); pen.restore();
    const values = state.color ? data.colors[state.color].values : data.groups;
    const colors = Array.from({ length: COLORS }, (_, i) => color(`--c${i}`)), paths = marks.map((d) => new Path2D(d));
    const size = data.groups.length > 1500 ? 0.42 : 0.55;
    const order = data.groups.map((group, i) => [chosen === null || group === chosen, i]).sort((a, b) => a[0] - b[0]);
    for (const [full, i] of order) {
      const [x, y] = state.places[i], value = values[i], big = i === state.at ? 2 : 1;
      const path = paths[value < 0 ? 0 : mark(value)], scale = size * big;
      pen.globalAlpha = full ? 1 : 0.08;
      pen.fillStyle = value < 0 ? muted : colors[value % COLORS];
      pen.setTransform(ratio * scale, 0, 0, ratio * scale, ratio * (x - 8 * scale), ratio * (y - 8 * scale));
      pen.fill(path);
      pen.strokeStyle = big > 1 ? ink : behind; // which keeps points apart that overlap
      pen.lineWidth = (big > 1 ? 1.5 : 0.6) / scale;
      pen.stroke(path);
    }
    pen.globalAlpha = 1;
    const beyond = across.beyond + up.beyond;
    figure.querySelector(".status").textContent =
      beyond ? `${beyond} far-out points are drawn at the edges.` : "";
  }

  function tip(figure, data, state) {
    const box = figure.querySelector(".tip"), i = state.at;
    box.hidden = i === null;
    if (i === null) return;
    box.replaceChildren();
    if (data.pictures) {
      const [x, y] = data.pictures[i];
      box.append(make("span", { className: "thumb", style: `--x:${x};--y:${y}` }));
    }
    for (const [name, values] of Object.entries(data.details))
      if (values[i] !== "" && values[i] !== null) box.append(make("div", {}, `${name} ${values[i]}`));
    const [x, y] = state.places[i], plane = box.parentElement;
    const left = x > plane.clientWidth / 2, top = y > plane.clientHeight / 2;
    box.style.left = left ? "auto" : `${x + 12}px`; box.style.right = left ? `${plane.clientWidth - x + 12}px` : "auto";
    box.style.top = top ? "auto" : `${y + 12}px`; box.style.bottom = top ? `${plane.clientHeight - y + 12}px` : "auto";
    if (state.keys) figure.querySelector(".status").textContent = [...box.children].map((d) => d.textContent).filter(Boolean).join(", ");
  }

  function nearest(state, data, x, y, limit, accept = () => true) {
    let best = null, least = limit ** 2;
    state.places.forEach(([px, py], i) => {
      const gap = (px - x) ** 2 + (py - y) ** 2;
      if (gap < least && accept(px - x, py - y, i) && (chosen === null || data.groups[i] === chosen)) [best, least] = [i, gap];
    });
    return best;
  }

  function legend(figure, data, state) {
    const given = state.color && data.colors[state.color], list = figure.querySelector(".legend");
    const names = given ? given.names : [...new Set(data.groups)].sort((a, b) => a - b);
    list.replaceChildren();
    if (names.length <= 40)
      names.forEach((name, index) => {
        const value = given ? index : name, item = make("li");
        item.innerHTML = `<svg class="chip" viewBox="0 0 16 16" aria-hidden="true" style="color:var(--c${value % COLORS})"><use href="#mark-${mark(value)}"/></svg>`;
        item.append(String(name));
        list.append(item);
      });
  }

  function chooser(tools, name, options, selected, change) {
    const select = make("select", {}, ...options.map(([value, label]) => make("option", { value, textContent: label })));
    select.value = selected;
    select.addEventListener("change", () => change(select.value));
    tools.append(make("label", {}, name, select));
    return select;
  }

  for (const figure of all(".map")) {
    const data = JSON.parse(figure.querySelector("script").textContent), canvas = figure.querySelector("canvas");
    const state = { axes: [0, Math.min(1, data.axes.length - 1)], color: "", at: null, keys: false, places: [] };
    const redraw = () => { draw(figure, data, state); tip(figure, data, state); };
    const tools = make("div", { className: "tools" }), axes = data.axes.map((axis, i) => [i, axis.name]);
    const turn = (place) => (value) => { state.axes[place] = Number(value); state.at = null; redraw(); };
    chooser(tools, "Across", axes, state.axes[0], turn(0));
    chooser(tools, "Up", axes, state.axes[1], turn(1));
    if (Object.keys(data.colors).length)
      chooser(tools, "Colour", [["", "cluster"], ...Object.keys(data.colors).map((c) => [c, c])], "", (value) => {
        state.color = value; legend(figure, data, state); redraw();
      });
    const groups = [...new Set(data.groups)].sort((a, b) => a - b);
    const pick = chooser(tools, "Cluster", [["", "all"], ...groups.map((g) => [g, g])], "", (value) => {
      chosen = null; choose(value === "" ? null : Number(value));
    });
    figure.prepend(tools);
    legend(figure, data, state);
    redraws.push(() => { pick.value = chosen === null ? "" : chosen; redraw(); });
    const hover = (event, limit) => nearest(state, data, event.offsetX, event.offsetY, limit);
    const show = (at, keys) => { if (at !== state.at) { state.at = at; state.keys = keys; redraw(); } };
    canvas.addEventListener("pointermove", (event) => show(hover(event, 14), false));
    canvas.addEventListener("pointerleave", () => show(null, false));
    canvas.addEventListener("click", (event) => {
      const at = hover(event, 14);
      choose(at === null ? null : data.groups[at]);
    });
    canvas.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Enter" && state.at !== null) choose(data.groups[state.at]);
      if (!way) return;
      event.preventDefault();
      const [x, y] = state.at === null ? [canvas.clientWidth / 2, canvas.clientHeight / 2] : state.places[state.at];
      const ahead = (dx, dy) => way[0] * dx + way[1] * dy > Math.abs(way[0] ? dy : dx) && (dx !== 0 || dy !== 0);
      const at = nearest(state, data, x, y, 1e6, state.at === null ? undefined : ahead);
      if (at !== null) show(at, true);
    });
    canvas.addEventListener("blur", () => show(null, false));
    addEventListener("resize", redraw);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    redraw();
  }
})();
