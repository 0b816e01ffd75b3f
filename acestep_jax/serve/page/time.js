// Times in words and numbers. No DOM here.

/** Return seconds as m:ss, or m:ss.t with `tenths`; negative times begin with a minus. */
export function clock(seconds, tenths = false) {
  if (!Number.isFinite(seconds)) return "–:––";
  const unit = tenths ? 10 : 1;
  const whole = Math.round(Math.abs(seconds) * unit);
  const minutes = Math.floor(whole / (60 * unit));
  const rest = (whole - minutes * 60 * unit) / unit;
  const text = rest.toFixed(tenths ? 1 : 0).padStart(tenths ? 4 : 2, "0");
  return `${seconds < 0 && whole > 0 ? "−" : ""}${minutes}:${text}`;
}

/** Return a rounded duration in words, such as "40 s" or "3 min". */
export function roughly(seconds) {
  if (seconds < 10) return `${Math.max(1, Math.ceil(seconds))} s`;
  if (seconds < 90) return `${Math.round(seconds / 5) * 5} s`;
  if (seconds < 90 * 60) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const STAGES = {
  queued: "starting",
  planning: "writing the plan",
  loading: "loading the model",
  encoding: "reading the text",
  denoising: "composing",
  aligning: "timing the lyrics",
  decoding: "decoding audio",
};

/** Return the progress of a record in words: its place in the queue, or its step, and the remaining time. */
export function progressText(record, secondsSince = 0) {
  if (record.status === "queued") {
    const ahead = Math.max(0, record.position - 1);
    const place =
      ahead === 0 ? "next in the queue" : ahead === 1 ? "one request before it" : `${ahead} requests before it`;
    return `Waiting, ${place}${remaining(record, secondsSince)}`;
  }
  if (record.status !== "running") return "";
  const step = `step ${record.step} of ${record.steps}`;
  const stage = record.stage === "denoising" && record.steps ? step : (STAGES[record.stage] ?? record.stage);
  return `Generating, ${stage}${remaining(record, secondsSince)}`;
}

function remaining(record, secondsSince) {
  if (record.eta_seconds === null || record.eta_seconds === undefined) return "; remaining time unknown";
  const left = record.eta_seconds - secondsSince;
  return left <= 0 ? "; almost there" : `; about ${roughly(left)} left`;
}

/** Return a time relative to now: "just now", "5 min ago", or a date. */
export function when(created, now = Date.now() / 1000) {
  const age = now - created;
  if (age < 60) return "just now";
  if (age < 3600) return `${Math.floor(age / 60)} min ago`;
  if (age < 24 * 3600) return `${Math.floor(age / 3600)} h ago`;
  return new Date(created * 1000).toLocaleDateString(undefined, { year: "numeric", month: "short", day: "numeric" });
}
