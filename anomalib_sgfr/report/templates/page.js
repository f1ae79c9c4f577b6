"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const units = data.score.map((score, i) => ({
    i, score, truth: data.truth[i], kind: data.kind[i], group: data.group[i], name: data.path[i],
    place: data.place[i], pixel: data.pixel[i], known: data.known[i], picture: data.picture[i] < 0 ? null : data.pictures[data.picture[i]],
  }));
  let threshold = data.start;

  const make = (tag, name, text) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const vector = (tag, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const short = (number) => (data.scaled ? number.toFixed(3) : Number(number.toPrecision(4)).toString());
  const exact = (number) => String(Number(number.toPrecision(9)));
  const percent = (share) => (100 * share).toFixed(1) + "%";

  // Wilson's interval, as in statistics.py
  const interval = (hits, number) => {
    if (!number) return [0, 1];
    const z = 1.959963984540054, share = hits / number, spread = (z * z) / number;
    const middle = (share + spread / 2) / (1 + spread);
    const half = (z / (1 + spread)) * Math.sqrt((share * (1 - share)) / number + spread / (4 * number));
    return [hits ? middle - half : 0, hits === number ? 1 : middle + half];
  };
  const told = (hits, number) => {
    const [low, high] = interval(hits, number);
    return `${hits} of ${number}, 95% interval ${percent(low)} to ${percent(high)}`;
  };
  const above = (unit) => unit.score > threshold;
  const isWrong = (unit) => unit.truth !== null && (unit.truth === 1) !== above(unit);
  const markOf = (unit) => {
    if (unit.truth === null) return above(unit) ? "anomalous" : "good";
    if (unit.truth === 1) return above(unit) ? "found" : "missed";
    return above(unit) ? "false alarm" : "passed";
  };

  // Counts
  const count = (some) => {
    const found = { good: 0, alarms: 0, bad: 0, missed: 0, unknown: 0, called: 0 };
    for (const unit of some) {
      const over = above(unit);
      if (unit.truth === 0) { found.good++; if (over) found.alarms++; }
      else if (unit.truth === 1) { found.bad++; if (!over) found.missed++; }
      else { found.unknown++; if (over) found.called++; }
    }
    return found;
  };
  const isNew = (unit) => unit.known === 0;
  const knownAs = ["", "trained on", "chose the threshold", "trained on, chose the threshold"];
  const partsOf = (found) => [["alarms", found.alarms, found.good], ["missed", found.missed, found.bad], ["called", found.called, found.unknown]];
  const tables = [...document.querySelectorAll("table[data-table]")].map((table) => {
    const key = table.dataset.table;
    const members = data[key + "s"].map(() => []);
    for (const unit of units) members[unit[key]].push(unit);
    return { rows: [...table.querySelectorAll("tr[data-row]")], members };
  });
  const square = by("roc");
  const dot = square && square.appendChild(make("span", "dot"));
  const countAgain = () => {
    const all = count(units);
    for (const [which, found] of [["count", count(units.filter(isNew))], ["all", all]]) {
      for (const [name, hits, number] of partsOf(found)) {
        const place = by(`${which}-${name}`);
        if (!place) continue;
        place.querySelector("b").textContent = percent(hits / number);
        place.querySelector("i").textContent = told(hits, number);
      }
    }
    for (const { rows, members } of tables) {
      rows.forEach((row, at) => {
        for (const [name, hits, number] of partsOf(count(members[at].filter(isNew)))) {
          const cell = row.querySelector(`[data-cell=${name}]`);
          if (!cell || !number) continue;
          const [low, high] = interval(hits, number);
          cell.textContent = `${hits}, ${percent(hits / number)} (${percent(low)} to ${percent(high)})`;
        }
      });
    }
    if (dot) {
      dot.style.left = `${(100 * all.alarms) / all.good}%`;
      dot.style.top = `${(100 * all.missed) / all.bad}%`;
    }
  };

  // The threshold
  const handle = by("handle"), plot = by("plot"), field = by("value"), zone = plot.querySelector(".zone");
  const span = data.high - data.low;
  const step = 10 ** Math.floor(Math.log10(span / 500));
  const rounded = (value) => Number((Math.round(value / step) * step).toPrecision(9));
  const within = (value) => Math.min(data.most, Math.max(data.least, value));
  const setThreshold = (value, typed) => {
    threshold = within(value);
    const share = Math.min(1, Math.max(0, (threshold - data.low) / span));
    handle.style.left = zone.style.left = `${100 * share}%`;
    handle.setAttribute("aria-valuenow", exact(threshold));
    handle.setAttribute("aria-valuetext", `${exact(threshold)}`);
    if (!typed) field.value = exact(threshold);
    by("reset").disabled = threshold === data.start;
    by("command").textContent = data.command[0] + exact(threshold) + data.command[1];
    countAgain();
    for (const [unit, mark] of marks) showMark(unit, mark);
  };
  const fromPointer = (event) => {
    const box = plot.getBoundingClientRect();
    setThreshold(rounded(data.low + (span * (event.clientX - box.left)) / box.width));
  };
  let dragging = false;
  plot.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    dragging = true;
    plot.setPointerCapture(event.pointerId);
    handle.focus({ preventScroll: true });
    fromPointer(event);
    event.preventDefault();
  });
  plot.addEventListener("pointermove", (event) => { if (dragging) fromPointer(event); });
  const release = () => { if (dragging) { dragging = false; arrange(); } };
  plot.addEventListener("pointerup", release);
  plot.addEventListener("pointercancel", release);
  handle.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -step, ArrowDown: -step, ArrowRight: step, ArrowUp: step, PageDown: -20 * step, PageUp: 20 * step };
    const ends = { Home: data.low, End: data.high };
    if (event.key in moves) setThreshold(rounded(threshold + moves[event.key] * (event.shiftKey ? 10 : 1)));
    else if (event.key in ends) setThreshold(ends[event.key]);
    else return;
    event.preventDefault();
    later();
  });
  let waiting = 0;
  const later = () => { clearTimeout(waiting); waiting = setTimeout(arrange, 300); };
  field.addEventListener("input", () => {
    const value = Number(field.value);
    if (field.value.trim() && Number.isFinite(value)) { setThreshold(value, true); later(); }
  });
  field.addEventListener("change", () => { field.value = exact(threshold); });
  by("reset").addEventListener("click", () => { setThreshold(data.start); arrange(); });
  by("copy").addEventListener("click", async () => {
    const code = by("command");
    let done = false;
    try { await navigator.clipboard.writeText(code.textContent); done = true; } catch {
      getSelection().selectAllChildren(code);
      done = document.execCommand("copy");
    }
    by("copy").textContent = done ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { by("copy").textContent = "Copy"; }, 1500);
  });

  // Maps, coloured here: one scale for all
  const palette = data.palette.match(/.{6}/g).map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  const paint = (canvas, source) => {
    const image = new Image();
    image.onload = () => {
      canvas.width = image.naturalWidth;
      canvas.height = image.naturalHeight;
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0);
      const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
      for (let at = 0; at < pixels.data.length; at += 4) pixels.data.set(palette[pixels.data[at]], at);
      context.putImageData(pixels, 0, 0);
    };
    image.src = source;
  };
  {
    const context = by("colours").getContext("2d");
    palette.forEach((colour, at) => { context.fillStyle = `rgb(${colour.join()})`; context.fillRect(at, 0, 1, 1); });
  }

  // A picture and its map
  const described = (unit) => `${unit.name}, score ${short(unit.score)}, ${markOf(unit)}` + (unit.kind >= 0 && data.kinds[unit.kind] ? `, ${data.kinds[unit.kind]}` : "");
  const spot = (place) => {
    const drawn = vector("svg", { class: "spot", viewBox: "0 0 12 12", "aria-hidden": "true" });
    drawn.style.setProperty("--x", `${100 * place[0]}%`);
    drawn.style.setProperty("--y", `${100 * place[1]}%`);
    drawn.append(vector("circle", { class: "halo", cx: 6, cy: 6, r: 5 }), vector("circle", { cx: 6, cy: 6, r: 5 }));
    return drawn;
  };
  const pair = (unit) => {
    const both = make("span", "pair"), picture = unit.picture;
    const left = make("span", "pic"), right = make("span", "pic");
    for (const side of [left, right]) side.style.aspectRatio = String(picture.aspect);
    const image = make("img");
    image.alt = described(unit);
    image.decoding = "async";
    image.src = picture.image;
    left.append(image);
    const lines = [];
    if (picture.outline) lines.push(["halo", picture.outline], ["flagged-line", picture.outline]);
    if (picture.truth) lines.push(["halo", picture.truth], ["truth-line", picture.truth]);
    if (lines.length) {
      const drawn = vector("svg", { viewBox: "0 0 1000 1000", preserveAspectRatio: "none", "aria-hidden": "true" });
      for (const [name, path] of lines) drawn.append(vector("path", { class: name, d: path }));
      left.append(drawn);
    }
    const map = make("canvas");
    map.setAttribute("role", "img");
    map.setAttribute("aria-label", "Anomaly map");
    paint(map, picture.heat);
    right.append(map);
    if (unit.place) right.append(spot(unit.place));
    both.append(left, right);
    return both;
  };

  // The gallery
  const gallery = by("gallery"), marks = new Map();
  const showMark = (unit, mark) => {
    mark.textContent = markOf(unit);
    mark.classList.toggle("wrong", isWrong(unit));
  };
  const card = (unit, at) => {
    const made = make("button", "card");
    made.type = "button";
    made.dataset.unit = unit.i;
    made.append(unit.picture ? pair(unit) : make("span", "none", "picture left out"));
    const line = make("span", "line"), mark = make("span", "mark");
    line.append(make("b", "", short(unit.score)), mark);
    if (data.kinds[unit.kind]) line.append(make("span", "kind", data.kinds[unit.kind]));
    const name = make("span", "name");
    name.append(make("bdi", "", unit.name));
    name.title = unit.name;
    showMark(unit, mark);
    marks.set(unit, mark);
    made.append(line, name);
    if (unit.known) made.append(make("span", "name", knownAs[unit.known]));
    made.addEventListener("click", () => open(at));
    return made;
  };
  const CHUNK = 48, PRINTED = 96;
  let order = [], drawn = 0;
  const distance = (unit) => Math.abs(unit.score - threshold);
  const sorts = {
    mistakes: (a, b) => isWrong(b) - isWrong(a) || (isWrong(a) ? distance(b) - distance(a) : distance(a) - distance(b)),
    near: (a, b) => distance(a) - distance(b),
    high: (a, b) => b.score - a.score,
    low: (a, b) => a.score - b.score,
    kind: (a, b) => data.kinds[a.kind].localeCompare(data.kinds[b.kind]) || b.score - a.score,
    name: (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }),
  };
  const filters = { "": () => true, fresh: isNew, wrong: isWrong, above, below: (unit) => !above(unit) };
  const draw = (number) => {
    const part = document.createDocumentFragment();
    for (const end = Math.min(order.length, drawn + number); drawn < end; drawn++) part.append(card(order[drawn], drawn));
    gallery.append(part);
  };
  const arrange = () => {
    clearTimeout(waiting);
    const kind = by("kind").value, group = by("group").value, keep = filters[by("mark").value];
    order = units.filter((unit) => keep(unit) && (kind === "" || unit.kind === Number(kind)) && (group === "" || unit.group === Number(group)));
    order.sort((a, b) => sorts[by("sort").value](a, b) || a.i - b.i);
    marks.clear();
    gallery.replaceChildren();
    drawn = 0;
    draw(CHUNK);
    by("shown").textContent = `${order.length} of ${units.length} images`;
  };
  const fill = (select, names) => names.forEach((name, at) => {
    const option = make("option", "", name || "not known");
    option.value = at;
    select.append(option);
  });
  fill(by("kind"), data.kinds);
  fill(by("group"), data.groups);
  by("sort").value = data.sort;
  for (const id of ["sort", "mark", "kind", "group"]) by(id).addEventListener("change", arrange);
  new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting) && drawn < order.length) draw(CHUNK);
  }, { rootMargin: "800px" }).observe(by("more"));
  addEventListener("beforeprint", () => {
    if (drawn < PRINTED) draw(PRINTED - drawn);
    by("printed").textContent = `${drawn} of ${order.length} pictures are printed; the file shows all.`;
  });

  // The large view
  const large = by("large");
  let current = 0;
  const patch = (uri, text, title, here) => {
    const figure = make("figure", here ? "here" : "");
    if (uri) {
      const image = make("img");
      image.src = uri;
      image.alt = here ? "The patch itself" : `Nominal patch of ${title || "an unknown image"}`;
      figure.append(image);
    } else figure.append(make("span", "gone", "image is gone"));
    for (const line of text) figure.append(make("figcaption", "", line));
    figure.title = title;
    return figure;
  };
  const mimic = (unit, left) => {
    const found = data.mimics[unit.i];
    if (!found) return [make("p", "quiet", "The mimic view is made of the images that matter most; this is none of them.")];
    if (found.why_not) return [make("p", "quiet", found.why_not)];
    const all = make("div", "mimic"), boxes = new Set();
    for (const row of found.rows) {
      if (!boxes.has(row.number)) {
        boxes.add(row.number);
        const box = make("span", "box");
        ["left", "top", "width", "height"].forEach((side, at) => { box.style[side] = `${100 * row.box[at]}%`; });
        box.append(make("b", "", row.number));
        left.append(box);
      }
      const line = make("div", "patches");
      line.append(patch(row.here, [`place ${row.number}`, `${row.pixels} pixels`], "", true));
      for (const [uri, share, name] of row.crops) line.append(patch(uri, [share, name], name, false));
      all.append(make("p", "quiet", `Place ${row.number}, patches of ${row.pixels} pixels: ${row.residual} is left; nominal patches of its kind leave at most ${row.nominal} on average. Rebuilt from:`), line);
    }
    return [make("h3", "", "The mimic view: nominal patches that rebuilt the worst places"), all];
  };
  const show = () => {
    const unit = order[current], body = by("large-body");
    by("large-h").textContent = unit.name;
    by("large-place").textContent = `${current + 1} of ${order.length}`;
    const said = make("p", "line"), mark = make("span", "mark");
    showMark(unit, mark);
    said.append(make("b", "", `score ${Number(unit.score.toPrecision(5))}`), mark);
    const truth = unit.truth === null ? "truth not known" : unit.truth ? `defective: ${data.kinds[unit.kind]}` : "good";
    const more = [truth];
    if (unit.known) more.push(knownAs[unit.known]);
    if (data.groups.length) more.push(data.groups[unit.group]);
    if (unit.pixel) more.push(`raised at row ${unit.pixel[0]}, column ${unit.pixel[1]} of the file`);
    said.append(make("span", "quiet", more.join(" · ")));
    const parts = [said];
    if (unit.picture) {
      const both = pair(unit);
      parts.unshift(both);
      parts.push(...mimic(unit, both.firstChild));
    } else parts.unshift(make("p", "none", "The picture is left out: there is no room for all."));
    body.replaceChildren(...parts);
    large.scrollTop = 0;
  };
  const open = (at) => { current = at; show(); if (!large.open) large.showModal(); };
  const go = (by_) => {
    current = (current + by_ + order.length) % order.length;
    show();
  };
  by("before").addEventListener("click", () => go(-1));
  by("after").addEventListener("click", () => go(1));
  by("close").addEventListener("click", () => large.close());
  large.addEventListener("click", (event) => { if (event.target === large) large.close(); });
  large.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") go(-1);
    else if (event.key === "ArrowRight") go(1);
    else return;
    event.preventDefault();
  });
  large.addEventListener("close", () => {
    while (drawn <= current && drawn < order.length) draw(CHUNK);
    const last = gallery.children[current];
    if (last) last.focus();
  });

  by("reset").disabled = true;
  countAgain();
  arrange();
  document.documentElement.dataset.ready = "yes";
})();
