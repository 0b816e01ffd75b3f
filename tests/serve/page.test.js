// What of the page is no DOM. `test_page.py` runs it with Node.js, where the page's modules lie beside it.
import assert from "node:assert/strict";
import { test } from "node:test";
import { spectrogram, transform } from "./fft.js";
import { lineAt, parse } from "./lrc.js";
import { guessTokens, withTag } from "./lyrics.js";
import { follower, oldest, vanished } from "./order.js";
import * as regions from "./regions.js";
import { EMPTY, fromRequest, isShown, readValue, reasonAgainst, songOf, toRequest } from "./request.js";
import { clock, progressText, roughly, when } from "./time.js";

const ID = "0f8fad5b-d9cb-469f-a165-70867728950e";
const field = (more = {}) => ({
  types: ["number"],
  many: false,
  values: [],
  tasks: ["text2music", "repaint", "cover"],
  group: "request",
  hidden: false,
  ...more,
});
const options = {
  fields: {
    prompt: field({ types: ["text"] }),
    lyrics: field({ types: ["text"], long: true }),
    bpm: field({ types: ["text", "number"] }),
    seed: field({ types: ["whole"] }),
    timesteps: field({ many: true, group: "sampling" }),
    snap_timesteps: field({ types: ["boolean"], group: "sampling" }),
    timesignature: field({ types: ["text", "number"], values: ["2", "3", "4", "6"] }),
    audio_cover_strength: field({ tasks: ["cover"] }),
    thinking: field({ types: ["boolean"], group: "planning" }),
    repainting_start: field({ many: true, tasks: ["repaint"] }),
  },
  tasks: {
    text2music: { accepts: [], regions: false, turbo: true, tokenized: false },
    repaint: { accepts: ["src_audio"], regions: true, turbo: true, tokenized: false },
    cover: { accepts: ["src_audio"], regions: false, turbo: true, tokenized: true },
    extract: { accepts: ["src_audio"], regions: false, turbo: false, tokenized: false },
  },
};
const state = (more) => ({ ...structuredClone(EMPTY), ...more });

test("clocks", () => {
  assert.equal(clock(0), "0:00");
  assert.equal(clock(59.96, true), "1:00.0");
  assert.equal(clock(-3.25, true), "−0:03.3");
  assert.equal(clock(725), "12:05");
  assert.equal(clock(NaN), "–:––");
  assert.equal(roughly(0.2), "1 s");
  assert.equal(roughly(42), "40 s");
  assert.equal(roughly(200), "3 min");
  assert.equal(when(1000, 1030), "just now");
  assert.equal(when(1000, 1000 + 3 * 3600), "3 h ago");
});

test("progress is honest: an unknown time is not told", () => {
  const running = { status: "running", stage: "denoising", step: 3, steps: 50, eta_seconds: null };
  assert.match(progressText(running), /step 3 of 50; remaining time unknown/);
  assert.match(progressText({ ...running, eta_seconds: 42 }, 20), /about 20 s left/);
  assert.match(progressText({ ...running, eta_seconds: 5 }, 9), /almost there/);
  assert.match(progressText({ status: "queued", position: 3, eta_seconds: null }), /2 requests before it/);
  assert.equal(progressText({ status: "done" }), "");
});

test("a view has room beyond both ends, and its fractions go back and forth", () => {
  const shown = regions.view(
    [
      { start: -6, end: 2 },
      { start: 20, end: 38 },
    ],
    30,
  );
  assert.ok(shown.start < -6 && shown.end > 38);
  for (const seconds of [-6, 0, 12.5, 38]) {
    assert.ok(Math.abs(regions.toSeconds(regions.toFraction(seconds, shown), shown) - seconds) < 1e-9);
  }
  assert.ok(regions.view([], 0).end > regions.view([], 0).start);
});

test("regions stay regions, and touch the source", () => {
  assert.deepEqual(regions.between(9, 4, 30), { start: 4, end: 9 });
  assert.deepEqual(regions.between(40, 35, 30), { start: 30, end: 40 });
  assert.deepEqual(regions.between(-9, -4, 30), { start: -9, end: 0 });
  assert.deepEqual(regions.withEdge({ start: 4, end: 9 }, "start", 12, 30), { start: 8.9, end: 9 });
  assert.deepEqual(regions.withEdge({ start: 4, end: 9 }, "end", 45, 30), { start: 4, end: 45 });
  assert.deepEqual(regions.withEdge({ start: -4, end: 9 }, "end", -2, 30), { start: -4, end: 0 });
  assert.deepEqual(regions.moved({ start: 4, end: 9 }, -100, 30), { start: -5, end: 0 });
  assert.deepEqual(regions.moved({ start: 4, end: 9 }, 100, 30), { start: 30, end: 35 });
  assert.deepEqual(regions.another([], 20), { start: 5, end: 10 });
  assert.ok(regions.another([{ start: 0, end: 20 }], 20).end <= 20);
});

test("regions become fields and come back", () => {
  assert.deepEqual(regions.toFields([]), {});
  assert.deepEqual(regions.toFields([{ start: 1, end: 2 }]), { repainting_start: 1, repainting_end: 2 });
  const two = [
    { start: 20, end: 38 },
    { start: -6, end: 2 },
  ];
  assert.deepEqual(regions.toFields(two), { repainting_start: [-6, 20], repainting_end: [2, 38] });
  assert.deepEqual(regions.fromFields(regions.toFields(two), 30), [two[1], two[0]]);
  assert.deepEqual(regions.fromFields({ repainting_start: 5, repainting_end: -1 }, 30), [{ start: 5, end: 30 }]);
  assert.deepEqual(regions.fromFields({ repainting_start: 5 }, 30), [{ start: 5, end: 30 }]);
  assert.deepEqual(regions.fromFields({}, 30), []);
  assert.equal(regions.offsetOf({ repainting_start: [-6.01, 4], repainting_end: [1, 5] }, 25), 6.04);
  assert.equal(regions.offsetOf({ repainting_start: 3 }, 25), 0);
});

test("lines of lyrics", () => {
  const lines = parse("[ti:Song]\n[00:12.50]one\r\n[00:03.00][01:02.25] again \n[00:12,9]no\nplain\n[00:20]");
  assert.deepEqual(
    lines.map((line) => line.time),
    [3, 12.5, 20, 62.25],
  );
  assert.equal(lines[0].text, "again");
  assert.equal(lineAt(lines, 0), -1);
  assert.equal(lineAt(lines, 12.5), 1);
  assert.equal(lineAt(lines, 1000), 3);
  assert.equal(lineAt([], 5), -1);
  assert.deepEqual(
    parse("[offset:+500]\n[00:02.00]early").map((line) => line.time),
    [1.5],
  );
  assert.deepEqual(
    parse("[00:01.00][Verse]\n[00:02.00]sung").map((line) => line.text),
    ["sung"],
  );
});

test("a tag goes on a line of its own, and no word is lost", () => {
  assert.deepEqual(withTag("", 0, "Verse"), { text: "[Verse]\n", cursor: 8 });
  assert.equal(withTag("one\ntwo", 3, "Chorus").text, "one\n\n[Chorus]\ntwo");
  assert.equal(withTag("one\n\n", 5, "Outro").text, "one\n\n[Outro]\n");
  const { text, cursor } = withTag("one two", 4, "Verse");
  assert.equal(text, "one\n\n[Verse]\ntwo");
  assert.equal(text.slice(0, cursor), "one\n\n[Verse]\n");
  assert.equal(guessTokens(""), 0);
  assert.equal(guessTokens("音楽"), 2);
});

test("a request holds what was set, and only what the task takes", () => {
  const values = { prompt: "lofi", bpm: 90, audio_cover_strength: 0.5, thinking: true };
  assert.deepEqual(toRequest(state({ values }), options).body, { prompt: "lofi", bpm: 90 });
  assert.deepEqual(toRequest(state({ values }), options, true).body, { prompt: "lofi", bpm: 90, thinking: true });
  const cover = toRequest(
    state({
      task: "cover",
      values,
      source: { kind: "song", id: ID, index: 1 },
      variations: 2,
      format: "mp3",
      adapters: { jazz: 0.5, off: NaN },
      model: "m",
    }),
    options,
  );
  assert.deepEqual(cover.body, {
    prompt: "lofi",
    bpm: 90,
    audio_cover_strength: 0.5,
    task_type: "cover",
    src_audio: `/v1/songs/${ID}/1.flac`,
    variations: 2,
    format: "mp3",
    adapters: { jazz: 0.5 },
    model: "m",
  });
  const file = { kind: "file", blob: {}, name: "a.wav" };
  const repaint = toRequest(
    state({
      task: "repaint",
      values: { prompt: "x" },
      source: file,
      reference: file,
      regions: [{ start: -1, end: 2 }],
    }),
    options,
  );
  assert.deepEqual(repaint.body, { prompt: "x", task_type: "repaint", repainting_start: -1, repainting_end: 2 });
  assert.deepEqual(Object.keys(repaint.files), ["src_audio", "reference_audio"]);
  assert.equal(toRequest(state({ source: file, values: {} }), options).files.src_audio, undefined);
});

test("a request comes back into the form", () => {
  const body = {
    prompt: "x",
    bpm: 100,
    task_type: "repaint",
    repainting_start: [1, 5],
    repainting_end: [2, -1],
    src_audio: `/v1/songs/${ID}/0.flac`,
    variations: 3,
    model: "m",
    adapters: { jazz: 1 },
    seconds: 30,
    thing: 1,
    lyrics: null,
  };
  const { state: found, unknown } = fromRequest(body, options, 30);
  assert.deepEqual(unknown, ["thing"]);
  assert.deepEqual(found.regions, [
    { start: 1, end: 2 },
    { start: 5, end: 30 },
  ]);
  assert.deepEqual([found.task, found.variations, found.model, found.source.id], ["repaint", 3, "m", ID]);
  const { seconds, thing, lyrics, ...known } = body;
  assert.deepEqual(toRequest(found, options).body, { ...known, repainting_end: [2, 30] });
  assert.throws(() => fromRequest([], options), /JSON object/);
  assert.equal(songOf("/etc/passwd"), null);
  assert.deepEqual(EMPTY.values, {});
});

test("what a control holds becomes a value of its type; what is none is left to the server", () => {
  assert.equal(readValue(options.fields.bpm, " 128 "), 128);
  assert.equal(readValue(options.fields.bpm, "fast"), "fast");
  assert.equal(readValue(options.fields.bpm, "0,5"), 0.5);
  assert.equal(readValue(options.fields.bpm, " "), undefined);
  assert.equal(readValue(options.fields.timesignature, "4"), "4");
  assert.equal(readValue(options.fields.snap_timesteps, "false"), false);
  assert.deepEqual(readValue(options.fields.timesteps, "0.9, 0.5,0.1"), [0.9, 0.5, 0.1]);
  assert.equal(readValue(options.fields.lyrics, "a\n b "), "a\n b ");
});

test("tasks that a model cannot do say why", () => {
  const turbo = { tasks: ["text2music", "repaint"], turbo: true };
  assert.equal(reasonAgainst("repaint", options.tasks.repaint, turbo), null);
  assert.match(reasonAgainst("extract", options.tasks.extract, turbo), /needs a base model/);
  assert.match(reasonAgainst("cover", options.tasks.cover, { ...turbo, turbo: false }), /audio tokenizer/);
  assert.ok(isShown("bpm", options.fields.bpm, "repaint", false));
  assert.ok(!isShown("audio_cover_strength", options.fields.audio_cover_strength, "repaint", false));
  assert.ok(!isShown("thinking", options.fields.thinking, "text2music", false));
  assert.ok(!isShown("repainting_start", options.fields.repainting_start, "repaint", false));
});

test("the transform is a Fourier transform", () => {
  const size = 16;
  const real = Float64Array.from({ length: size }, (_, i) => Math.sin(i * i) + i / 7);
  const imaginary = Float64Array.from({ length: size }, (_, i) => Math.cos(3 * i));
  const wanted = Array.from({ length: size }, (_, k) => {
    let re = 0;
    let im = 0;
    for (let n = 0; n < size; n++) {
      const angle = (-2 * Math.PI * k * n) / size;
      re += real[n] * Math.cos(angle) - imaginary[n] * Math.sin(angle);
      im += real[n] * Math.sin(angle) + imaginary[n] * Math.cos(angle);
    }
    return [re, im];
  });
  transform(size)(real, imaginary);
  wanted.forEach(([re, im], k) => assert.ok(Math.abs(real[k] - re) < 1e-9 && Math.abs(imaginary[k] - im) < 1e-9));
});

test("a tone is brightest in the row of its octave", () => {
  const rate = 48000;
  const samples = Float32Array.from({ length: rate }, (_, i) => 0.5 * Math.sin((2 * Math.PI * 1000 * i) / rate));
  const [columns, rows] = [10, 64];
  const levels = spectrogram(samples, rate, columns, rows);
  const column = Array.from({ length: rows }, (_, row) => levels[row * columns + 5]);
  const brightest = rows - 1 - column.indexOf(Math.max(...column));
  assert.equal(brightest, Math.floor((rows * Math.log(1000 / 40)) / Math.log(24000 / 40)));
  assert.equal(Math.max(...column), 255);
  assert.equal(column[0], 0);
});

test("records of the history stand by their time, and go when the server has them no more", () => {
  const made = (id, created) => ({ id, created });
  const [a, b, c, d] = [made("a", 1), made("b", 2), made("c", 3), made("d", 4)];
  assert.equal(oldest([]), null);
  assert.equal(oldest([c, a, b]), a);
  assert.equal(oldest([c, b]), b); // a was removed: what is older than b is asked for
  assert.equal(follower(c, [d, a, b]), b); // heard of late, it does not come before d
  assert.equal(follower(a, [d, c, b]), null);
  assert.deepEqual(vanished([a, b, c], [a, c], 20), ["b"]);
  assert.deepEqual(vanished([a, b, c], [d, c], 2), []); // a and b are further down than was asked for
  assert.deepEqual(vanished([a, b], [a, b], 20), []); // d was requested meanwhile, and not asked for
});
