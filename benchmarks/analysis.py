"""Five questions, a few lines of pandas each:  python benchmarks/analysis.py [DIR]  (default: results/quick)

Meant to be read, copied and changed: cells are marked with `# %%`, so that editors and Jupyter can run them one by one.
The tables are `fedsim.load(DIR)`'s: `runs` (a row a run), `rounds` (a row a round), `clients` (a row a participant and
round); what their columns mean is in `fedsim/results/columns.py`.
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false, reportOptionalOperand=false

# %%
import sys
from pathlib import Path

import pandas as pd


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, Python looks beside this file only

import fedsim
from fedsim.report.readings import finished_runs


directory = sys.argv[1] if len(sys.argv) > 1 else "results/quick"
try:
    results = fedsim.load(directory)
except ValueError as error:
    sys.exit(f"error: {error}")
pd.set_option("display.width", 120, "display.max_columns", 12, "display.max_rows", 500, "display.precision", 3)
pd.set_option("display.max_colwidth", 80)

# What is compared with what: a suite may hold several federations (`setting`), and variants of a method (`method`).
runs = pd.DataFrame(finished_runs(results))
names = runs[["run_id", "setting", "method"]]
rounds = results.rounds.drop(columns="method").merge(names, on="run_id")  # variants told apart.sort_values("round")
rounds["megabytes"] = (rounds["bytes_up_total"] + rounds["bytes_down_total"]) / 1e6
scored = rounds.dropna(subset=["accuracy_mean"])
last = scored.groupby("run_id").tail(1)

# %% 1. Who wins at equal bytes? Every run is read at its last round within what Fed-Grow sent in its whole run.
fedgrow = rounds[rounds["algorithm"] == "fedgrow"].groupby(["setting", "seed", "run_id"])["megabytes"].max()
budget = fedgrow.groupby(["setting", "seed"]).min().rename("budget").reset_index()
affordable = scored.merge(budget, on=["setting", "seed"]).query("megabytes <= budget or round == 0")
equal_bytes = affordable.groupby("run_id").tail(1)
print("\n1. Accuracy at equal bytes, mean and standard deviation over seeds")
print(equal_bytes.groupby(["setting", "method"])["accuracy_mean"].agg(["mean", "std", "count"]))

# %% 2. Who is left behind? Mean accuracy by class of device, and the worst participant of a run.
ends = results.deployed.merge(names, on="run_id")
by_tier = ends.pivot_table(index=["setting", "method"], columns="tier", values="accuracy")
worst = ends.groupby(["setting", "method", "run_id"])["accuracy"].min().groupby(["setting", "method"]).mean()
print("\n2. Accuracy by class of device, and of the worst participant")
print(by_tier.assign(worst=worst))

# %% 3. What did it cost? Bytes and FLOPs of all participants; memory and trained parameters of one.
spent = rounds.groupby("run_id").agg(megabytes=("megabytes", "max"), gigaflops=("flops", "sum"))
cost = runs.set_index("run_id").join(spent / [1, 1e9])
columns = ["megabytes", "gigaflops", "trainable_params", "bytes_per_upload", "peak_bytes"]
print("\n3. What it cost")
print(cost.groupby(["setting", "method"])[columns].mean())

# %% 4. Does federation help at all? Fed-Grow minus the same growth without averaging, seed by seed.
grown = last[last["algorithm"].isin(["fedgrow", "fedgrow_no_federation"])]
grown = grown.assign(variant=grown["method"].str.replace("fedgrow_no_federation", "fedgrow"))
pairs = grown.pivot_table(index=["setting", "variant", "seed"], columns="algorithm", values="accuracy_mean")
gain = 100 * (pairs.get("fedgrow", float("nan")) - pairs.get("fedgrow_no_federation", float("nan")))
print("\n4. What averaging Global adds, percentage points (mean, standard deviation over seeds)")
print(gain.dropna().groupby(["setting", "variant"]).agg(["mean", "std", "count"]) if len(pairs.columns) == 2 else "-")

# %% 5. What does heterogeneity do? Accuracy on everybody's labels against accuracy on one's own mix of labels.
skew = last.groupby(["setting", "method"])[["accuracy_mean", "accuracy_local_mean"]].mean()
print("\n5. Accuracy on everybody's labels, and on one's own mix of labels")
print(skew.assign(gap=skew["accuracy_local_mean"] - skew["accuracy_mean"]))
