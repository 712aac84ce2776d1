# The study as a graph of commands, for several GPUs or a cluster: the runs of the plans, then the
# report. Optional: `pip install -e .[scale]`. `python -m editcore study` makes the same runs on one
# machine, and either takes over what the other left.
#
#     snakemake --cores 4                                           all plans, then the report
#     snakemake --cores 4 runs --config plans="orders" models="pocket gpt2-xl" words="n_edits 300"
#     snakemake --cores 16 --resources gpu=4 --config full=true gpu=1    four GPUs, a run on each
#     snakemake --workflow-profile profiles/slurm --config full=true gpu=1
#
# Every value below can be given with --config. `snakemake -n` shows what would be done.
import shlex
import subprocess

PYTHON = config.get("python", ".venv/bin/python")   # of an environment that has the package
FULL = ["--full"] if config.get("full", False) else []      # the parameters of the full study
PLANS = shlex.split(str(config.get("plans", "")))   # with full notebooks; all of them if empty
MODELS = shlex.split(str(config.get("models", "")))
WORDS = shlex.split(str(config.get("words", "")))   # parameters of all runs, NAME VALUE ...
NOTEBOOKS = ["--notebooks", config.get("notebooks", "notebooks")]
OUT = str(config.get("out", "results/runs"))
REPORTS = str(config.get("reports", "results/study/reports" if FULL else "results/reports"))
if set("{}") & {*OUT, *REPORTS}:
    raise ValueError("--config out and reports: braces cannot stand in a place")

MODEL_WORDS = ["--model", *MODELS] if MODELS else []
PARAMETERS = ["-p", *WORDS] if WORDS else []
STUDY = shlex.join([PYTHON, "-m", "editcore", "study", *PLANS, *FULL, *NOTEBOOKS, *MODEL_WORDS,
                    *PARAMETERS, "-o", OUT])
REPORT = shlex.join([PYTHON, "-m", "editcore", "report", *FULL, *NOTEBOOKS, "-o", REPORTS,
                     *(PARAMETERS if FULL else [])])


def finished(wildcards):
    """List the files of all planned runs, when the graph is drawn."""
    lines = subprocess.run(shlex.split(STUDY) + ["--list"], check=True, stdout=subprocess.PIPE,
                           text=True).stdout.splitlines()
    return [f"{OUT}/{line.split()[0]}/{name}" for line in lines
            for name in ("run.json", "rows.parquet")]


rule report:
    input: finished
    output: f"{REPORTS}/index.html"
    threads: 2
    shell: "{REPORT}"


rule runs:
    input: finished


# `update` leaves the files of an earlier start where they are: work is never done again.
rule run:
    output: update(f"{OUT}/{{id}}/run.json"), update(f"{OUT}/{{id}}/rows.parquet")
    log: f"{OUT}/{{id}}/log.txt"
    wildcard_constraints: id=r"[\w.+-]+"
    threads: int(config.get("threads", 1))
    resources: gpu=int(config.get("gpu", 0))
    shell: "OMP_NUM_THREADS={threads} {STUDY} --only {wildcards.id:q} > {log:q} 2>&1"
