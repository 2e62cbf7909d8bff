/* What an empty conversation proposes, by the model that is served. */

const DEMO = ["What is 17 + 25?", "Spell 'river' backwards.", "Count from 1 to 40."];
const GENERAL = [
  "Explain in three sentences why the sky is blue.",
  "Write a short, friendly email that moves a meeting to Friday.",
  "Give me five ideas for a rainy weekend.",
  "What is the difference between a list and a tuple in Python?",
];
const SMALL = [
  "What is the capital of Norway?",
  "Why is the sky blue?",
  "Give me three tips for sleeping well.",
  "Write a Python function that reverses a string.",
];
const CODE = [
  "Write a Python function that finds the longest word in a text.",
  "Explain this regular expression: ^\\d{4}-\\d{2}-\\d{2}$",
  "Write a SQL query for the ten customers with the most orders.",
  "What does `git rebase` do that `git merge` does not?",
];

/** Prompts that this model can do something with. */
export function promptsFor(model) {
  if (/^demo\b/i.test(model)) return DEMO;
  if (/code|devstral/i.test(model)) return CODE;
  return /smol|tiny|\d{2,3}m\b|\b0\.\d+b/i.test(model) ? SMALL : GENERAL;
}
