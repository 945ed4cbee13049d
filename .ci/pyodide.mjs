// Run a Python program in Pyodide: node pyodide.mjs FOLDER PROGRAM
// It is called where `npm i pyodide` was. FOLDER holds the installed packages. The program prints "N passed, 0 failed", or this fails.
import { readFileSync } from "node:fs";

const [folder, program] = process.argv.slice(2);
const { loadPyodide } = await import(process.cwd() + "/node_modules/pyodide/pyodide.mjs");

let output = "";
function print(text) {
    output += text + "\n";
    console.log(text);
}

const pyodide = await loadPyodide({ stdout: print, stderr: print });
pyodide.FS.mkdirTree("/site");
pyodide.mountNodeFS("/site", folder);
pyodide.runPython("import sys; sys.path.insert(0, '/site')");
try {
    await pyodide.runPythonAsync(readFileSync(program, { encoding: "utf8" }), { filename: program });
} catch (error) {
    print(String(error).slice(0, 5000));
}
process.exit(/^[1-9]\d* passed, 0 failed$/m.test(output) ? 0 : 1);
