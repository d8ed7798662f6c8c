// Fetches the page's live part again while there is something to see, draws the figures that it bears, and
// asks the API for what its buttons say.
"use strict";

const PERIOD_MS = 1000;
const SLOW_PERIOD_MS = 10000;
const OVER = ["completed", "failed", "cancelled"];

let timer = null;
let turn = 0;
let acting = false;

function draw(live) {
  for (const table of live.querySelectorAll("[data-figure]")) {
    const place = document.getElementById(table.dataset.plot);
    if (!place || place.dataset.drawn === table.dataset.figure) continue;
    const figure = JSON.parse(table.dataset.figure);
    Plotly.react(place, figure.data, figure.layout, { responsive: true, displaylogo: false });
    place.dataset.drawn = table.dataset.figure;
  }
}

function stateOf(live) {
  return live.querySelector("[data-state]")?.dataset.state;
}

function isOver(live) {
  return OVER.includes(stateOf(live));
}

// A selector under which an element is found again in the next version of the live part.
function placeOf(element) {
  if (element.id) return `#${CSS.escape(element.id)}`;
  if (element.tagName === "SUMMARY") return `#${CSS.escape(element.parentElement.id)} > summary`;
  return `a[href="${CSS.escape(element.getAttribute("href"))}"]`;
}

// What a reader has opened stays open, and the keyboard stays where it was.
function replace(live, html) {
  const state = stateOf(live);
  const opened = Array.from(live.querySelectorAll("details[open]"), (details) => details.id);
  const focus = live.contains(document.activeElement) ? placeOf(document.activeElement) : null;
  live.innerHTML = html;
  for (const id of opened) document.getElementById(id)?.setAttribute("open", "");
  if (focus !== null) {
    (live.querySelector(focus) ?? live.querySelector("[data-state]"))?.focus({ preventScroll: true });
  }
  if (stateOf(live) !== state) say("said", `This sweep is ${stateOf(live)}.`);
}

function schedule(live, period) {
  clearTimeout(timer);
  timer = setTimeout(() => refresh(live), period);
}

async function refresh(live) {
  if (document.hidden) {
    schedule(live, PERIOD_MS);
    return;
  }
  const mine = ++turn;
  let reached = false;
  try {
    const answer = await fetch(live.dataset.live);
    const html = await answer.text();
    if (mine !== turn) return; // a later one has been asked for: it knows more
    if (answer.ok) {
      replace(live, html);
      draw(live);
    }
    live.classList.toggle("stale", !answer.ok);
    reached = true;
  } catch (error) {
    if (mine !== turn) return;
    live.classList.add("stale");
  }
  if (!isOver(live)) schedule(live, reached && stateOf(live) !== "paused" ? PERIOD_MS : SLOW_PERIOD_MS);
}

async function act(live, button) {
  if (acting || (button.dataset.confirm && !confirm(button.dataset.confirm))) return;
  acting = true;
  say("alert", "");
  const { problem } = await ask(button.dataset.post);
  if (problem) say("alert", problem.detail);
  acting = false;
  await refresh(live);
}

document.addEventListener("DOMContentLoaded", () => {
  const live = document.getElementById("live");
  if (live === null) return;
  live.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-post]");
    if (button !== null) act(live, button);
  });
  draw(live);
  if (!isOver(live)) schedule(live, PERIOD_MS);
});
