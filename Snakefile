# The study as a graph of commands, for several GPUs or a cluster: the runs of data/study.toml, then the report.
# Optional: `pip install -e .[scale]`. Without it `python -m editcore study` makes the same runs one machine at a time,
# and either takes over what the other left: a run is done when its run.json and rows.parquet are there.
#
#     snakemake --cores 4                                             all grids, then the small report
#     snakemake --cores 4 runs --config grids="orders methods" models="pocket gpt2-xl" words="n_edits 300 seed 0,1"
#     snakemake --cores 16 --resources gpu=4 --config full=true gpu=1     the full study, four GPUs, a run on each
#     snakemake --workflow-profile profiles/slurm --config full=true gpu=1
#     snakemake --jobs 50 --executor cluster-generic --cluster-generic-submit-cmd "qsub -cwd -l gpu={resources.gpu}"
#
# Every value below can be given with --config. `snakemake -n` shows what would be done.
import shlex
import subprocess

PYTHON = config.get("python", ".venv/bin/python")       # of an environment that has the package
FULL = config.get("full", False)                        # the parameters of the full study, or those of the grids
GRIDS = shlex.split(str(config.get("grids", "")))       # grids, with full notebooks; all of them if empty
MODELS = shlex.split(str(config.get("models", "")))     # those of the grids if empty
WORDS = shlex.split(str(config.get("words", "")))       # parameters of all runs, with full of all notebooks
NOTEBOOKS = config.get("notebooks", "notebooks")
OUT = config.get("out", "results/runs")
REPORTS = config.get("reports", "results/study/reports" if FULL else "results/reports")

COMMON = ["--notebooks", NOTEBOOKS, *(["--full"] if FULL else [])]
STUDY = shlex.join([PYTHON, "-m", "editcore", "study", *GRIDS, *COMMON, "-o", OUT,
                    *(["--model", *MODELS] if MODELS else []), *(["-p", *WORDS] if WORDS else [])])
# One report a model; without `full` the notebooks keep their own parameters.
PAGES = {f"{REPORTS}/{model.rpartition('/')[2]}" if len(MODELS) > 1 else REPORTS: model for model in MODELS or [""]}


def finished(wildcards):
    """The files of all runs that are planned; asked for when the graph is drawn, not in every job."""
    lines = subprocess.run(f"{STUDY} --list", shell=True, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [f"{OUT}/{line.split()[0]}/{name}" for line in lines.splitlines() for name in ("run.json", "rows.parquet")]


def parameters(wildcards):
    """What a report is told beside the file's parameters."""
    model = PAGES[wildcards.place]
    words = (["model", model] if model else []) + (WORDS if FULL else [])
    return shlex.join([*COMMON, *(["-p", *words] if words else [])])


rule report:
    input: [f"{place}/index.html" for place in PAGES]


rule runs:
    input: finished


# `update` leaves the files of an earlier start where they are, so that work that is done is never done again.
rule run:
    output: update(f"{OUT}/{{id}}/run.json"), update(f"{OUT}/{{id}}/rows.parquet")
    log: f"{OUT}/{{id}}/log.txt"
    wildcard_constraints: id=r"[\w.+-]+"
    threads: config.get("threads", 1)
    resources: gpu=config.get("gpu", 0)
    shell: "OMP_NUM_THREADS={threads} {STUDY} --only {wildcards.id} > {log} 2>&1"


rule page:
    input: finished
    output: "{place}/index.html"
    params: words=parameters
    threads: 2
    shell: "{PYTHON} -m editcore report {params.words} -o {wildcards.place}"
