// Submits the paper's presets, and a spec of one's own, as any client of the API does.
"use strict";

const SWEEPS = "/api/v1/sweeps";
const YAML = { "Content-Type": "application/yaml" };

let busy = false;
// Stays until the spec is changed, so that an answer that got lost does no harm.
let ownKey = null;

function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (n) => n.toString(16).padStart(2, "0")).join("");
}

function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
  return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} min`;
}

function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

async function alone(act) {
  if (busy) return;
  busy = true;
  try {
    await act();
  } finally {
    busy = false;
  }
}

// --- presets ---

// A preset's sweep that is there already may have been stopped, or have failed packs: it goes on.
async function submitted(headers, spec) {
  let answer = await ask(SWEEPS, { headers, body: JSON.stringify(spec) });
  for (const action of ["resume", "retry"]) {
    if (answer.body?.actions.includes(action)) answer = await ask(`${SWEEPS}/${answer.body.id}/${action}`);
  }
  return answer;
}

async function submitPreset(button) {
  const { preset } = button.dataset;
  const sweeps = JSON.parse(button.dataset.sweeps);
  const links = [];
  say(`alert-${preset}`, "");
  for (const { name, key, spec } of sweeps) {
    say(`said-${preset}`, `Submitting ${name}, ${links.length + 1} of ${sweeps.length} …`);
    const headers = { "Content-Type": "application/json", "Idempotency-Key": key };
    const { body, problem } = await submitted(headers, spec);
    if (problem) {
      say(`said-${preset}`, "");
      say(`alert-${preset}`, `${name}: ${problem.detail}`);
      return;
    }
    const link = element("a", name);
    link.href = `/sweeps/${body.id}`;
    link.dataset.id = body.id;
    links.push(link);
  }
  if (sweeps.length === 1) {
    location.assign(`/sweeps/${links[0].dataset.id}`);
  } else {
    document.getElementById(`said-${preset}`).replaceChildren("Submitted: ", ...links.flatMap((one) => [one, " "]));
  }
}

// --- a spec of one's own ---

function itemOf({ field, value, allowed }) {
  return element("li", element("code", field), ": got ", element("code", value), `; allowed: ${allowed}`);
}

function showProblem(spec, problem) {
  const errors = problem?.errors ?? [];
  const parts = [];
  if (errors.length > 0) {
    parts.push(element("p", `The spec has ${count(errors.length, "error")}:`), element("ul", ...errors.map(itemOf)));
  } else if (problem) {
    parts.push(element("p", problem.detail));
  }
  const alert = document.getElementById("own-alert");
  alert.replaceChildren(...parts);
  alert.scrollIntoView({ block: "nearest" });
  spec.setAttribute("aria-invalid", String(errors.length > 0));
}

async function sendOwn(spec, path, headers, words) {
  say("own-said", words);
  showProblem(spec, null);
  const { body, problem } = await ask(path, { headers: { ...YAML, ...headers }, body: spec.value });
  if (problem) {
    say("own-said", "");
    showProblem(spec, problem);
  }
  return body;
}

async function validateOwn(spec) {
  const found = await sendOwn(spec, `${SWEEPS}/validate`, {}, "Checking …");
  if (!found) return;
  const size = `${count(found.runs, "run")} in ${count(found.packs, "pack")}, ${count(found.run_steps, "update")}`;
  say("own-said", `The spec is good: ${size}, about ${duration(found.estimated_seconds)} of one core.`);
}

async function submitOwn(spec) {
  ownKey ??= newKey();
  const sweep = await sendOwn(spec, SWEEPS, { "Idempotency-Key": ownKey }, "Submitting …");
  if (sweep) location.assign(`/sweeps/${sweep.id}`);
}

document.addEventListener("DOMContentLoaded", () => {
  for (const button of document.querySelectorAll("button[data-sweeps]")) {
    button.addEventListener("click", () => alone(() => submitPreset(button)));
  }
  const spec = document.getElementById("own-spec");
  spec.addEventListener("input", () => {
    ownKey = null;
    say("own-said", "");
  });
  document.getElementById("own-validate").addEventListener("click", () => alone(() => validateOwn(spec)));
  document.getElementById("own-submit").addEventListener("click", () => alone(() => submitOwn(spec)));
});
