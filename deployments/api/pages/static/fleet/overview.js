/* What changes slowly and is asked for now and then: usage, batches and adapters, as far as the reader's key may see them. */

import { drawAdapters } from "./adapters.js";
import { drawBatches } from "./batches.js";
import { get } from "./server.js";
import { drawUsage } from "./usage.js";

const INTERVAL_MS = 15_000;
let drawnAt = -Infinity;

/** Told of every event; asks at its interval, while the page is looked at. */
export async function noteFleet({ router, batches }) {
  const now = performance.now();
  if (document.hidden || now - drawnAt < INTERVAL_MS) return;
  drawnAt = now;
  let reader;
  try {
    reader = await get("v1/usage");
  } catch {
    return; // the record of usage is away: it is asked again
  }
  const isAdmin = reader.role === "admin";
  if (!isAdmin) for (const id of ["usage", "faults"]) document.getElementById(id).hidden = true;
  const hasAdapters = router.num_adapters > 0 || Object.keys(router.adapter_faults ?? {}).length > 0;
  await Promise.allSettled([
    ...(isAdmin ? [drawUsage()] : []),
    ...(isAdmin && hasAdapters ? [drawAdapters()] : []),
    ...(batches ? [drawBatches(reader.key, isAdmin)] : []),
  ]);
}
