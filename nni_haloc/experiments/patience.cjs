// Loaded into NNI's manager before its own code, by `haloc create` and `haloc resume`.
// The manager gives its tuner ten seconds to connect, then ends the experiment. Importing NNI takes
// a second of processor time, and on a busy machine more than ten of anybody's.
'use strict';

const start = globalThis.setTimeout;
const seconds = Number(process.env.NNI_HALOC_PATIENCE);
delete process.env.NNI_HALOC_PATIENCE;

globalThis.setTimeout = function (callback, delay, ...rest) {
    const late = delay === 10000 && String(callback).includes('Tuner did not connect');
    return start(callback, late ? 1000 * seconds : delay, ...rest);
};
Object.assign(globalThis.setTimeout, start);
