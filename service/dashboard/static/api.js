// What the pages' scripts share: asking the API for something.
"use strict";

const NO_ANSWER = "The server does not answer. Try again later.";

async function problemOf(answer) {
  try {
    return await answer.json();
  } catch (error) {
    return { detail: `The server answered ${answer.status}.` };
  }
}

// Returns the answer's body, or the problem document that came in its place.
async function ask(path, options) {
  try {
    const answer = await fetch(path, { method: "POST", ...options });
    return answer.ok ? { body: await answer.json() } : { problem: await problemOf(answer) };
  } catch (error) {
    return { problem: { detail: NO_ANSWER } };
  }
}

function say(id, words) {
  const place = document.getElementById(id);
  if (place !== null) place.textContent = words;
}
