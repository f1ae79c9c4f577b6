"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const images = data.score.map((score, i) => ({
    i, score, truth: data.truth[i], kind: data.kind[i], group: data.group[i], name: data.path[i],
    peak: data.peak[i], pixel: data.pixel[i], known: data.known[i], media: data.mediaIndex[i] < 0 ? null : data.media[data.mediaIndex[i]],
  }));
  let threshold = data.start;

  const element = (tag, name, text) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const svgElement = (tag, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const short = (number) => (data.normalised ? number.toFixed(3) : Number(number.toPrecision(4)).toString());
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
  const shareText = (hits, number) => {
    const [low, high] = interval(hits, number);
    return `${hits} of ${number}, 95% interval ${percent(low)} to ${percent(high)}`;
  };
  const above = (image) => image.score > threshold;
  const isWrong = (image) => image.truth !== null && (image.truth === 1) !== above(image);
  const resultOf = (image) => {
    if (image.truth === null) return above(image) ? "anomalous" : "good";
    if (image.truth === 1) return above(image) ? "found" : "missed";
    return above(image) ? "false alarm" : "passed";
  };

  // Counts
  const count = (some) => {
    const found = { good: 0, alarms: 0, bad: 0, missed: 0, unknown: 0, called: 0 };
    for (const image of some) {
      const over = above(image);
      if (image.truth === 0) { found.good++; if (over) found.alarms++; }
      else if (image.truth === 1) { found.bad++; if (!over) found.missed++; }
      else { found.unknown++; if (over) found.called++; }
    }
    return found;
  };
  const isNew = (image) => image.known === 0;
  const knownAs = ["", "trained on", "chose the threshold", "trained on, chose the threshold"];
  const partsOf = (found) => [["alarms", found.alarms, found.good], ["missed", found.missed, found.bad], ["called", found.called, found.unknown]];
  const tables = [...document.querySelectorAll("table[data-table]")].map((table) => {
    const key = table.dataset.table;
    const members = data[key + "s"].map(() => []);
    for (const image of images) members[image[key]].push(image);
    return { rows: [...table.querySelectorAll("tr[data-row]")], members };
  });
  const square = by("roc");
  const dot = square && square.appendChild(element("span", "dot"));
  const updateCounts = () => {
    const all = count(images);
    for (const [which, found] of [["count", count(images.filter(isNew))], ["all", all]]) {
      for (const [name, hits, number] of partsOf(found)) {
        const line = by(`${which}-${name}`);
        if (!line) continue;
        line.querySelector("b").textContent = percent(hits / number);
        line.querySelector("i").textContent = shareText(hits, number);
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
    updateCounts();
    for (const [image, mark] of marks) showMark(image, mark);
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
  for (const button of document.querySelectorAll("button.copy")) button.addEventListener("click", async () => {
    const code = button.previousElementSibling;
    let done = false;
    try { await navigator.clipboard.writeText(code.textContent); done = true; } catch {
      getSelection().selectAllChildren(code);
      done = document.execCommand("copy");
    }
    button.textContent = done ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });

  // Maps, coloured on one scale
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

  // An image and its map
  const described = (image) => `${image.name}, score ${short(image.score)}, ${resultOf(image)}` + (image.kind >= 0 && data.kinds[image.kind] ? `, ${data.kinds[image.kind]}` : "");
  const spot = (peak) => {
    const drawn = svgElement("svg", { class: "spot", viewBox: "0 0 12 12", "aria-hidden": "true" });
    drawn.style.setProperty("--x", `${100 * peak[0]}%`);
    drawn.style.setProperty("--y", `${100 * peak[1]}%`);
    drawn.append(svgElement("circle", { class: "halo", cx: 6, cy: 6, r: 5 }), svgElement("circle", { cx: 6, cy: 6, r: 5 }));
    return drawn;
  };
  const pair = (image) => {
    const both = element("span", "pair"), media = image.media;
    const left = element("span", "pic"), right = element("span", "pic");
    for (const side of [left, right]) side.style.aspectRatio = String(media.aspect);
    const shown = element("img");
    shown.alt = described(image);
    shown.decoding = "async";
    shown.src = media.image;
    left.append(shown);
    const lines = [];
    if (media.outline) lines.push(["halo", media.outline], ["flagged-line", media.outline]);
    if (media.maskOutline) lines.push(["halo", media.maskOutline], ["truth-line", media.maskOutline]);
    if (lines.length) {
      const drawn = svgElement("svg", { viewBox: "0 0 1000 1000", preserveAspectRatio: "none", "aria-hidden": "true" });
      for (const [name, path] of lines) drawn.append(svgElement("path", { class: name, d: path }));
      left.append(drawn);
    }
    const map = element("canvas");
    map.setAttribute("role", "img");
    map.setAttribute("aria-label", "Anomaly map");
    paint(map, media.map);
    right.append(map);
    if (image.peak) right.append(spot(image.peak));
    both.append(left, right);
    return both;
  };

  // The gallery
  const gallery = by("gallery"), marks = new Map();
  const showMark = (image, mark) => {
    mark.textContent = resultOf(image);
    mark.classList.toggle("wrong", isWrong(image));
  };
  const card = (image, at) => {
    const made = element("button", "card");
    made.type = "button";
    made.dataset.image = image.i;
    made.append(image.media ? pair(image) : element("span", "none", "image left out"));
    const line = element("span", "line"), mark = element("span", "mark");
    line.append(element("b", "", short(image.score)), mark);
    if (data.kinds[image.kind]) line.append(element("span", "kind", data.kinds[image.kind]));
    const name = element("span", "name");
    name.append(element("bdi", "", image.name));
    name.title = image.name;
    showMark(image, mark);
    marks.set(image, mark);
    made.append(line, name);
    if (image.known) made.append(element("span", "name", knownAs[image.known]));
    made.addEventListener("click", () => open(at));
    return made;
  };
  const CHUNK = 48, PRINTED = 96;
  let order = [], drawn = 0;
  const distance = (image) => Math.abs(image.score - threshold);
  const sorts = {
    mistakes: (a, b) => isWrong(b) - isWrong(a) || (isWrong(a) ? distance(b) - distance(a) : distance(a) - distance(b)),
    near: (a, b) => distance(a) - distance(b),
    high: (a, b) => b.score - a.score,
    low: (a, b) => a.score - b.score,
    kind: (a, b) => data.kinds[a.kind].localeCompare(data.kinds[b.kind]) || b.score - a.score,
    name: (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }),
  };
  const filters = { "": () => true, fresh: isNew, wrong: isWrong, above, below: (image) => !above(image) };
  const draw = (number) => {
    const part = document.createDocumentFragment();
    for (const end = Math.min(order.length, drawn + number); drawn < end; drawn++) part.append(card(order[drawn], drawn));
    gallery.append(part);
  };
  const arrange = () => {
    clearTimeout(waiting);
    const kind = by("kind").value, group = by("group").value, keep = filters[by("mark").value];
    order = images.filter((image) => keep(image) && (kind === "" || image.kind === Number(kind)) && (group === "" || image.group === Number(group)));
    order.sort((a, b) => sorts[by("sort").value](a, b) || a.i - b.i);
    marks.clear();
    gallery.replaceChildren();
    drawn = 0;
    draw(CHUNK);
    by("shown").textContent = `${order.length} of ${images.length} images`;
  };
  const fill = (select, names) => names.forEach((name, at) => {
    const option = element("option", "", name || "unlabelled");
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
    by("printed").textContent = `${drawn} of ${order.length} images are printed; the file shows all.`;
  });

  // The large view
  const large = by("large");
  let current = 0;
  const patch = (uri, text, title, own) => {
    const figure = element("figure", own ? "own" : "");
    if (uri) {
      const image = element("img");
      image.src = uri;
      image.alt = own ? "The inspected patch" : `Nominal patch of ${title || "an unknown image"}`;
      figure.append(image);
    } else figure.append(element("span", "gone", "image is gone"));
    for (const line of text) figure.append(element("figcaption", "", line));
    figure.title = title;
    return figure;
  };
  const explanation = (image, left) => {
    const found = data.explanations[image.i];
    if (!found) return [element("p", "quiet", "Only the most important images are explained; this is not one of them.")];
    if (found.whyNot) return [element("p", "quiet", found.whyNot)];
    const all = element("div", "explanation"), boxes = new Set();
    for (const row of found.rows) {
      if (!boxes.has(row.number)) {
        boxes.add(row.number);
        const box = element("span", "box");
        ["left", "top", "width", "height"].forEach((side, at) => { box.style[side] = `${100 * row.box[at]}%`; });
        box.append(element("b", "", row.number));
        left.append(box);
      }
      const line = element("div", "patches");
      line.append(patch(row.crop, [`region ${row.number}`, `${row.pixels} pixels`], "", true));
      for (const [uri, coefficient, name] of row.atoms) line.append(patch(uri, [coefficient, name], name, false));
      all.append(element("p", "quiet", `Region ${row.number}, patches of ${row.pixels} pixels: residual ${row.residual}; similar nominal patches have at most ${row.nominal} on average. Reconstructed from:`), line);
    }
    return [element("h3", "", "Explanation: nominal patches that reconstruct the worst regions"), all];
  };
  const show = () => {
    const image = order[current], body = by("large-body");
    by("large-h").textContent = image.name;
    by("large-index").textContent = `${current + 1} of ${order.length}`;
    const said = element("p", "line"), mark = element("span", "mark");
    showMark(image, mark);
    said.append(element("b", "", `score ${Number(image.score.toPrecision(5))}`), mark);
    const truth = image.truth === null ? "unlabelled" : image.truth ? `defective: ${data.kinds[image.kind]}` : "good";
    const more = [truth];
    if (image.known) more.push(knownAs[image.known]);
    if (data.groups.length) more.push(data.groups[image.group]);
    if (image.pixel) more.push(`peak at row ${image.pixel[0]}, column ${image.pixel[1]} of the file`);
    said.append(element("span", "quiet", more.join(" · ")));
    const parts = [said];
    if (image.media) {
      const both = pair(image);
      parts.unshift(both);
      parts.push(...explanation(image, both.firstChild));
    } else parts.unshift(element("p", "none", "The page leaves this image out: it shows the most important ones."));
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
  updateCounts();
  arrange();
  document.documentElement.dataset.ready = "yes";
})();
