// The dashboard's page. What the server says is shown as text only, never as markup.
//
// One WebSocket brings states (text) and pictures (binary: length of the header, header, JPEG). Each
// is answered with its number once it is drawn, and the server sends no more than that allows.

const $ = (id) => document.getElementById(id);
const SILENT_AFTER = 5000; // ms without a word from the server
const RANGE = 300; // points of the plot, one a second

let socket = null;
let retry = 0; // tries since the connection was lost
let heard = 0; // when the server last spoke, performance.now()
let points = [];
let state = null;
let picture = null; // {bitmap, header, at}
let frozen = false;
const drawnAt = []; // of the last pictures

// --- connection -----------------------------------------------------------------------------

function connect() {
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  const mine = new WebSocket(`${scheme}//${location.host}/live`);
  socket = mine;
  mine.binaryType = "arraybuffer";
  mine.onopen = () => {
    points = []; // the server sends them all to a new viewer
    sayVisible();
  };
  mine.onmessage = async (event) => {
    heard = performance.now();
    retry = 0;
    let n = 0;
    try {
      n = typeof event.data === "string" ? showState(event.data) : await showPicture(event.data);
    } finally {
      if (n && mine.readyState === WebSocket.OPEN) mine.send(JSON.stringify({ got: n }));
    }
  };
  mine.onclose = () => {
    if (socket !== mine) return;
    socket = null;
    const wait = Math.min(5000, 400 * 2 ** retry) * (0.75 + Math.random() / 2);
    retry += 1;
    if (retry > 1) explain();
    setTimeout(() => socket || connect(), wait);
  };
}

async function explain() {
  // A WebSocket does not tell why it was refused.
  let text = "No connection to the dashboard";
  let mend = "Trying again. Is it still running, and is the network up?";
  try {
    const reply = await fetch("/api/models");
    if (reply.status === 401) {
      text = "The token is not valid any more";
      mend = "Open the URL that the dashboard printed when it started.";
    } else if (reply.ok) {
      text = "Connecting";
      mend = "";
    } else {
      mend = await reply.text();
    }
  } catch {
    // not reachable: said above
  }
  if (!socket || socket.readyState !== WebSocket.OPEN) setStatus("silent", text, mend);
}

function sayVisible() {
  if (socket && socket.readyState === WebSocket.OPEN) {
    socket.send(JSON.stringify({ visible: !document.hidden && !frozen }));
  }
}

document.addEventListener("visibilitychange", () => {
  sayVisible();
  if (!document.hidden && !socket) connect();
});
addEventListener("online", () => socket || connect());
addEventListener("pageshow", () => socket || connect());

setInterval(() => {
  const quiet = performance.now() - heard;
  if (heard && quiet > SILENT_AFTER) {
    setStatus("silent", "The dashboard is silent", `Nothing heard for ${Math.round(quiet / 1000)} s.`);
    if (socket && quiet > 4 * SILENT_AFTER) socket.close();
  }
  noteOnPicture();
}, 1000);

// --- text ----------------------------------------------------------------------------------

function setText(element, text) {
  // Only when it changes: screen readers say it again, and browsers lay out again.
  if (element.textContent !== text) element.textContent = text;
}

function setStatus(level, text, mend) {
  $("status").dataset.level = level;
  setText($("status-text"), text);
  setText($("status-mend"), mend);
  document.title = level === "ok" ? "Sorting line" : `(!) ${text}`;
}

function show(value, digits = 0) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

// Make as many children as there are entries, and let `fill` set each; what is there is kept.
function repeat(parent, entries, make, fill) {
  while (parent.children.length > entries.length) parent.lastElementChild.remove();
  while (parent.children.length < entries.length) parent.append(make());
  entries.forEach((entry, i) => fill(parent.children[i], entry));
}

function rowMaker(columns) {
  return () => {
    const row = element("tr");
    for (const name of columns) row.append(element("td", "", name));
    return row;
  };
}

// --- state ---------------------------------------------------------------------------------

function showState(text) {
  const first = state === null;
  state = JSON.parse(text);
  const s = state;
  setStatus(s.summary.level, s.summary.text, s.summary.mend);
  const silent = s.summary.level === "silent";
  setText($("rate"), show(silent ? null : s.rate, s.rate >= 100 ? 0 : 1));
  setText($("rate-note"), `${s.images} images`);
  setText($("p99"), s.p99 > 9999 ? ">9999" : show(s.p99));
  setText($("p99-note"), `median ${show(s.p50)} ms`);
  setText($("in-view"), show(s.inView));
  setText($("in-view-note"), s.tracked === null ? "items" : `${s.tracked} followed on the belt`);
  setText($("dropped"), show(silent ? null : s.dropped.minute));
  setText($("dropped-note"), `images of the last minute`);
  $("dropped").parentElement.title = `${s.dropped.total} in all: ${
    Object.entries(s.dropped.parts).map(([name, count]) => `${name} ${count}`).join(", ")}`;
  setText($("model-name"), s.model.name || "–");
  showClasses(s.classes, s.inView !== null);
  showItems(s);
  showHealth(s.diagnostics);
  showArms(s.arms);
  const named = Object.entries(s.stages).map(([name, ms]) => `${name} ${show(ms, 1)}`);
  setText($("stages"), named.length ? `Stages [ms]: ${named.join(", ")}` : "");
  if (s.points.length || first) {
    points = points.concat(s.points).slice(-600);
    drawPlot();
  }
  showRollBack();
  return s.n;
}

function showClasses(classes, fresh) {
  repeat($("class-list"), classes, () => {
    const item = element("li");
    const track = element("div", undefined, "track");
    track.append(element("div", undefined, "fill"));
    item.append(element("span", "", "name"), track, element("span", "", "count"));
    return item;
  }, (item, c) => {
    const [name, track, count] = item.children;
    setText(name, c.name);
    const fill = track.firstElementChild;
    fill.style.width = `${100 * c.share}%`;
    fill.style.background = c.color;
    track.title = `${Math.round(100 * c.share)} % of the last minute`;
    setText(count, fresh ? String(c.now) : "–");
    item.title = c.total === null ? "" : `${c.total} since the start`;
  });
  const totals = classes.filter((c) => c.total);
  setText($("class-note"), !classes.length ? "no items yet"
    : "Numbers: in view now. Bars: share of the last minute."
      + (totals.length ? ` In all: ${totals.map((c) => `${c.name} ${c.total}`).join(", ")}.` : ""));
}

const FLAGS = [[1, "touching"], [2, "cut off"], [4, "uncertain"]];

function showItems(s) {
  const colors = Object.fromEntries(s.classes.map((c) => [c.name, c.color]));
  setText($("items-note"), s.tracked !== null ? `${s.tracked}, in the belt's frame`
    : s.inView !== null ? `${s.inView}, in the camera's frame` : "none are coming");
  repeat($("item-rows"), s.items, rowMaker(["n", "", "n", "n", "n", "n", ""]), (row, item) => {
    const cells = row.children;
    setText(cells[0], String(item.id));
    if (cells[1].dataset.kind !== item.kind) {
      cells[1].dataset.kind = item.kind;
      const dot = element("span", undefined, "dot");
      dot.style.background = colors[item.kind] || "#f0f0f0";
      cells[1].replaceChildren(dot, item.kind);
    }
    setText(cells[2], show(item.score, 2));
    setText(cells[3], item.place.map((v) => show(v)).join(", "));
    setText(cells[4], item.size.filter((v, i) => i < 2 || v).map((v) => show(v)).join(" × "));
    setText(cells[5], show(item.yaw));
    const flags = FLAGS.filter(([bit]) => item.flags & bit).map(([, name]) => name);
    const due = item.pick === null ? "yes"
      : item.pick < 0 ? `${show(-item.pick, 1)} s ago` : `in ${show(item.pick, 1)} s`;
    setText(cells[6], [item.reason || due, ...(item.reason ? [] : flags)].join(", "));
    cells[6].className = item.reason ? "no" : "";
  });
}

const WORDS = { ok: "OK", warn: "WARN", error: "ERROR" };

function showHealth(diagnostics) {
  $("health-none").hidden = diagnostics.length > 0;
  repeat($("health-list"), diagnostics, () => {
    const item = element("li");
    const details = element("details");
    const summary = element("summary");
    summary.append(element("span", "", "badge"), element("span", "", "said"));
    details.append(summary, element("dl"));
    item.append(details);
    return item;
  }, (item, d) => {
    const details = item.firstElementChild;
    const [summary, list] = details.children;
    if (item.dataset.name !== d.name) details.open = false; // another one's place
    item.dataset.name = d.name;
    item.dataset.level = d.level;
    setText(summary.children[0], WORDS[d.level]);
    setText(summary.children[1], `${d.name}: ${d.message}`);
    if (!details.open) return;
    const values = Object.entries(d.values).flat();
    if (list.children.length !== values.length) {
      list.replaceChildren(...values.map((v, i) => element(i % 2 ? "dd" : "dt", v)));
    } else {
      values.forEach((v, i) => setText(list.children[i], v));
    }
  });
}

function percent(share) {
  return share === null ? "–" : `${(100 * share).toFixed(1)} %`;
}

function showArms(arms) {
  $("arms").hidden = arms.length === 0;
  repeat($("arm-rows"), arms, rowMaker(["", "", "n", "n", "n", "n", "n"]), (row, arm) => {
    const purity = arm.purity === null ? percent(arm.expected) : percent(arm.purity);
    const told = arm.purity === null && arm.expected !== null ? `≈ ${purity}` : purity;
    [arm.name, arm.state, show(arm.ordered), show(arm.picked), show(arm.missed), show(arm.wrong), told]
      .forEach((text, i) => setText(row.children[i], text));
    row.className = arm.state === "dead" ? "dead" : "";
    row.title = Object.entries(arm.kinds).map(([kind, n]) => `${kind} ${n}`).join(", ");
  });
  // Of all arms together: as counted against the truth where that is known, else as the scores say.
  const counted = arms.filter((arm) => arm.purity !== null);
  const held = counted.reduce((sum, arm) => sum + arm.right + arm.wrong, 0);
  const right = counted.reduce((sum, arm) => sum + arm.right, 0);
  const ordered = arms.reduce((sum, arm) => sum + arm.ordered, 0);
  const scores = arms.reduce((sum, arm) => sum + arm.ordered * (arm.expected || 0), 0);
  if (held) setText($("purity"), percent(right / held));
  else setText($("purity"), ordered ? `≈ ${percent(scores / ordered)}` : "–");
  setText($("purity-note"), held ? `purity: ${right} of ${held} picks right`
    : "purity to be expected from the scores of what was ordered");
}

// --- plot ----------------------------------------------------------------------------------

function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((m) => m * power).find((top) => top >= value);
}

function fit(canvas, width, height) {
  const dense = Math.min(2, devicePixelRatio || 1);
  const [w, h] = [Math.round(width * dense), Math.round(height * dense)];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  return dense;
}

function drawPlot() {
  const canvas = $("plot");
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!width) return;
  const dense = fit(canvas, width, height);
  const g = canvas.getContext("2d");
  g.setTransform(dense, 0, 0, dense, 0, 0);
  g.clearRect(0, 0, width, height);
  const panel = getComputedStyle($("latency"));
  const [ink, grid] = [getComputedStyle($("stages")).color, panel.borderTopColor];
  const [c50, c99] = ["p50", "p99"].map(
    (name) => getComputedStyle(document.querySelector(`.key .${name}`)).backgroundColor);
  const shown = points.slice(-RANGE);
  const highest = Math.max(10, ...shown.flatMap((p) => [p[2] || 0, p[3] || 0]));
  const top = niceTop(highest * 1.05);
  g.font = `14px ${panel.fontFamily}`;
  const left = g.measureText(`${top} ms`).width + 12;
  const [right, up, down] = [8, 14, 24];
  const last = shown.length ? shown[shown.length - 1][0] : 0;
  const x = (n) => width - right - ((last - n) / RANGE) * (width - left - right);
  const y = (ms) => height - down - (ms / top) * (height - up - down);
  g.fillStyle = ink;
  g.strokeStyle = grid;
  g.lineWidth = 1;
  g.textBaseline = "middle";
  g.textAlign = "right";
  for (let i = 0; i <= 4; i += 1) {
    const value = (top * i) / 4;
    g.beginPath();
    g.moveTo(left, Math.round(y(value)) + 0.5);
    g.lineTo(width - right, Math.round(y(value)) + 0.5);
    g.stroke();
    if (i % 2 === 0) g.fillText(`${value} ms`, left - 8, y(value));
  }
  g.textBaseline = "alphabetic";
  for (const [ago, text] of [[RANGE, "5 min ago"], [RANGE / 2, "2.5"], [0, "now"]]) {
    g.textAlign = ago === 0 ? "right" : ago === RANGE ? "left" : "center";
    g.fillText(text, x(last - ago), height - 6);
  }
  for (const [column, stroke] of [[2, c50], [3, c99]]) {
    g.strokeStyle = stroke;
    g.lineWidth = 2.5;
    g.lineJoin = "round";
    g.beginPath();
    let pen = false;
    for (const p of shown) {
      if (p[column] === null) {
        pen = false; // a gap: nothing came
      } else {
        if (pen) g.lineTo(x(p[0]), y(p[column]));
        else g.moveTo(x(p[0]), y(p[column]));
        pen = true;
      }
    }
    g.stroke();
  }
  const newest = shown[shown.length - 1];
  canvas.setAttribute("aria-label", newest
    ? `Latency over the last five minutes; now median ${show(newest[2])}, p99 ${show(newest[3])} ms`
    : "Latency over time; nothing yet");
}

addEventListener("resize", () => {
  drawPlot();
  drawPicture();
});

// --- picture -------------------------------------------------------------------------------

async function showPicture(data) {
  const length = new DataView(data).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  let bitmap = null;
  if (data.byteLength > 4 + length) {
    try {
      bitmap = await createImageBitmap(new Blob([new Uint8Array(data, 4 + length)], { type: "image/jpeg" }));
    } catch {
      header.problem = "a picture came that cannot be read";
    }
  }
  if (frozen) {
    if (bitmap) bitmap.close();
    return header.n;
  }
  if (picture && picture.bitmap) picture.bitmap.close();
  picture = { bitmap, header, at: performance.now() };
  drawnAt.push(picture.at);
  while (drawnAt[0] < picture.at - 5000) drawnAt.shift();
  drawPicture();
  noteOnPicture();
  return header.n;
}

function drawPicture() {
  if (!picture) return;
  const { bitmap, header } = picture;
  const width = header.width || (bitmap ? bitmap.width : 640);
  const height = header.height || (bitmap ? bitmap.height : 480);
  const canvas = $("view");
  // As sharp as the screen, so that the lines and names are, too.
  const wide = Math.max(320, canvas.parentElement.clientWidth);
  fit(canvas, wide, (wide * height) / width);
  const scale = canvas.width / width;
  const g = canvas.getContext("2d");
  g.setTransform(scale, 0, 0, scale, 0, 0);
  if (bitmap) {
    g.drawImage(bitmap, 0, 0, width, height);
  } else {
    g.fillStyle = "#2a2f2e";
    g.fillRect(0, 0, width, height);
  }
  const dot = canvas.width / wide / scale; // a CSS pixel in pixels of the image
  for (const item of header.items) drawItem(g, item, header.colors[item.kind] || "#f0f0f0", dot);
  for (const item of header.items) drawGrasp(g, item, dot);
  const taken = [];
  for (const item of header.items) {
    drawName(g, item, header.colors[item.kind] || "#f0f0f0", dot, width, height, taken);
  }
  const seen = header.items.map((item) => item.kind);
  canvas.setAttribute("aria-label", `The belt with ${seen.length} items: ${seen.join(", ")}`);
}

function drawItem(g, item, color, dot) {
  const o = item.outline;
  if (o.length < 6) return;
  g.beginPath();
  g.moveTo(o[0], o[1]);
  for (let i = 2; i < o.length; i += 2) g.lineTo(o[i], o[i + 1]);
  g.closePath();
  g.globalAlpha = 0.35;
  g.fillStyle = color;
  g.fill();
  g.globalAlpha = 1;
  g.lineWidth = 2.5 * dot;
  g.strokeStyle = color;
  g.stroke();
}

function drawGrasp(g, item, dot) {
  const [x0, y0, x1, y1] = item.grasp;
  if (y1 === undefined) return;
  const length = Math.hypot(x1 - x0, y1 - y0) || 1;
  const [nx, ny] = [(7 * dot * (y0 - y1)) / length, (7 * dot * (x1 - x0)) / length];
  for (const [stroke, wide] of [["#000", 4], [item.pick ? "#fff" : "#9a9a9a", 2]]) {
    g.strokeStyle = stroke;
    g.lineWidth = wide * dot;
    g.setLineDash(item.pick ? [] : [4 * dot, 4 * dot]);
    g.beginPath();
    g.moveTo(x0, y0);
    g.lineTo(x1, y1);
    g.stroke();
    g.setLineDash([]);
    g.beginPath();
    for (const [x, y] of [[x0, y0], [x1, y1]]) {
      g.moveTo(x - nx, y - ny);
      g.lineTo(x + nx, y + ny);
    }
    g.stroke();
  }
}

function drawName(g, item, color, dot, width, height, taken) {
  const o = item.outline;
  if (o.length < 2) return;
  let [left, top, bottom] = [Infinity, Infinity, -Infinity];
  for (let i = 0; i < o.length; i += 2) {
    left = Math.min(left, o[i]);
    top = Math.min(top, o[i + 1]);
    bottom = Math.max(bottom, o[i + 1]);
  }
  const text = `${item.kind} ${item.score === null ? "" : item.score.toFixed(2)}`;
  const [size, pad] = [16 * dot, 4 * dot];
  g.font = `600 ${size}px system-ui, "DejaVu Sans", sans-serif`;
  const w = g.measureText(text).width + 2 * pad;
  const h = size + 1.5 * pad;
  const x = Math.max(0, Math.min(left, width - w));
  const free = (y) => taken.every(([a, b]) => x >= a + w || a >= x + w || y >= b + h || b >= y + h);
  const places = [top - h, bottom, top, (top + bottom - h) / 2]
    .map((y) => Math.max(0, Math.min(y, height - h)));
  const y = places.find(free) ?? places[0];
  taken.push([x, y]);
  g.fillStyle = color;
  g.fillRect(x, y, w, h);
  const [red, green, blue] = [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
  g.fillStyle = 0.299 * red + 0.587 * green + 0.114 * blue > 110 ? "#000" : "#fff";
  g.textAlign = "left";
  g.textBaseline = "middle";
  g.fillText(text, x + pad, y + h / 2);
}

function noteOnPicture() {
  const note = $("stage-note");
  const age = picture ? performance.now() - picture.at : Infinity;
  let text = "";
  if (frozen) text = "Held: this is not live";
  else if (!picture) text = "No picture yet";
  else if (age > 3000) text = `No new picture for ${Math.round(age / 1000)} s`;
  else if (picture.header.problem) text = picture.header.problem;
  else if (picture.header.bare) text = "Nobody looks for items in this picture";
  else if (!picture.bitmap) text = "Items without the camera's picture";
  setText(note, text);
  note.hidden = !text;
  $("stage").classList.toggle("old", !frozen && age > 3000 && picture !== null);
  const recent = drawnAt.filter((at) => at > performance.now() - 5000);
  const span = recent.length > 1 ? (recent[recent.length - 1] - recent[0]) / 1000 : 0;
  const others = state && state.viewers > 1 ? `, ${state.viewers} look on` : "";
  setText($("picture-rate"), picture === null ? "no picture yet"
    : `${span ? ((recent.length - 1) / span).toFixed(1) : "0"} pictures/s here${others}`);
}

$("freeze").addEventListener("click", () => {
  frozen = !frozen;
  $("freeze").setAttribute("aria-pressed", String(frozen));
  setText($("freeze"), frozen ? "Go on" : "Hold picture");
  sayVisible();
  noteOnPicture();
});

// --- model ---------------------------------------------------------------------------------

const dialog = $("model-dialog");
let busy = false;

function tell(text, bad = false) {
  setText($("model-result"), text);
  $("model-result").classList.toggle("bad", bad);
}

function showRollBack() {
  const m = state ? state.model : { previous: "", kept: false };
  const can = m.kept || m.previous !== "";
  $("roll-back").disabled = busy || !can;
  setText($("roll-back"), m.kept ? "Roll back" : can ? `Back to ${m.previous}` : "Nothing to roll back");
}

function setBusy(now) {
  busy = now;
  $("use-model").disabled = now || !document.querySelector("input[name=model]:checked");
  showRollBack();
}

async function listModels() {
  const list = $("model-list");
  list.querySelectorAll(".choice").forEach((choice) => choice.remove());
  const reply = await fetch("/api/models");
  if (!reply.ok) throw new Error(await reply.text());
  const { models } = await reply.json();
  for (const model of models) {
    const choice = element("label", undefined, model.problem ? "choice broken" : "choice");
    const radio = element("input");
    Object.assign(radio, { type: "radio", name: "model", value: model.name });
    radio.disabled = Boolean(model.problem);
    radio.checked = Boolean(state && state.model.name === model.name);
    radio.addEventListener("change", () => setBusy(busy));
    const about = model.problem || [model.head, model.architecture, model.input, model.precision,
      model.classes.join(" ")].filter(Boolean).join(" · ");
    choice.append(radio, element("b", model.name), element("span", about, "quiet"));
    list.append(choice);
  }
  if (!models.length) throw new Error("there are none on this machine");
}

async function change(path, body, doing) {
  setBusy(true);
  tell(doing);
  try {
    const reply = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    if (!reply.ok) throw new Error(await reply.text());
    const { success, message, model } = await reply.json();
    if (success) tell(`At work now: ${model}${message ? `; ${message}` : ""}`);
    else tell(`Not changed: ${message}`, true);
    const radio = [...document.querySelectorAll("input[name=model]")].find((r) => r.value === model);
    if (radio) radio.checked = true;
  } catch (error) {
    tell(`Not changed: ${error.message}`, true);
  } finally {
    setBusy(false);
  }
}

$("open-model").addEventListener("click", async () => {
  tell("Looking for models");
  $("use-model").disabled = true;
  dialog.showModal();
  try {
    await listModels();
    tell("");
  } catch (error) {
    tell(`The models cannot be listed: ${error.message}`, true);
  }
  setBusy(busy);
});
$("close-model").addEventListener("click", () => dialog.close());
$("model-form").addEventListener("submit", (event) => event.preventDefault());
$("use-model").addEventListener("click", () => {
  const chosen = document.querySelector("input[name=model]:checked");
  if (chosen) {
    change("/api/model", { model: chosen.value, backend: $("backend").value },
      `Loading ${chosen.value}; the old one works until it is ready`);
  }
});
$("roll-back").addEventListener("click", () => change("/api/rollback", {}, "Going back"));

// --- theme ---------------------------------------------------------------------------------

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  drawPlot();
}

try {
  const kept = localStorage.getItem("theme");
  if (kept) setTheme(kept);
} catch {
  // no storage: as the system says
}
$("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme
    || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const next = now === "dark" ? "light" : "dark";
  setTheme(next);
  try {
    localStorage.setItem("theme", next);
  } catch {
    // for this time only
  }
});

connect();
