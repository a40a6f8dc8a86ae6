"""The columns of the tables: what every one of them holds, and whether it may be null."""

from collections.abc import Mapping

import pyarrow as pa


SCHEMA_KEY = b"fedsim_schema"
SCHEMA_VERSION = 1


def _schema(**columns: str) -> pa.Schema:
    """Columns by name in order. A type that ends with `?` may be null."""
    types = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
    fields = [pa.field(name, types[kind.rstrip("?")], nullable=kind.endswith("?")) for name, kind in columns.items()]
    return pa.schema(fields, metadata={SCHEMA_KEY: str(SCHEMA_VERSION).encode()})


RUNS = _schema(
    run_id="str",
    suite="str",
    algorithm="str",
    preset="str?",  # null where the method grows nothing
    dataset="str",
    family="str",
    partition="str",
    alpha="float?",  # null where the partition has no such parameter
    participants="int",  # the population
    cohort="int",
    rounds="int",
    seed="int",
    target_params="int?",  # null, like the counts below, where a run failed before they were known
    trainable_params="float?",  # mean over participants, who may differ: a fraction is possible
    upload_params="float?",
    status="str",  # finished | failed
    wall_seconds="float?",
    git_commit="str?",  # null outside a checkout
    code_sha256="str",
    versions="str",  # JSON
    hardware="str",  # JSON
    config="str",  # JSON: the experiment, canonical
    bytes_per_upload="int?",  # one participant's upload in a federated round
    model="str?",  # the target form, for example "128x4"
    federation_sha256="str?",  # partition, small models and cohorts: equal for all methods of a suite and seed
    error="str?",  # null unless failed
    labels="str?",  # JSON: the participants' label histograms, a list of lists
    held_bytes="int?",  # the participant with most: its private state and what it receives, by count
    peak_bytes="int?",  # the same, in a training step: with gradients, moments and what waits for the backward pass
    command="str?",  # what was typed to start it
)

ROUNDS = _schema(
    run_id="str",
    algorithm="str",
    seed="int",
    round="int",
    stage="str",  # local (round 0, and every round in which nothing is shared) | federated | finetune
    accuracy_mean="float?",
    accuracy_std="float?",
    accuracy_min="float?",
    accuracy_local_mean="float?",
    accuracy_local_std="float?",
    accuracy_local_min="float?",
    accuracy_val_mean="float?",
    accuracy_global="float?",
    loss_mean="float?",
    train_loss="float?",
    bytes_up="int",
    bytes_down="int",
    bytes_up_total="int",
    bytes_down_total="int",
    flops="int?",
    wall_seconds="float",
    retries="int",
    participants="int",  # the size of this round's cohort
    state_sha256="str",
    bytes_moved="int?",  # what physically moved inside the cluster
    seam_bytes_up="int?",  # the runtime's own count, independent of bytes_up
    seam_bytes_down="int?",
    accuracy_val_std="float?",
    accuracy_val_min="float?",
    failed="int",  # participants dropped from this round
    precision_mean="float?",  # of entities, like the two below: null unless token classes are the tags of entities
    recall_mean="float?",
    f1_mean="float?",
    coverage="float?",  # share of the target's parameters trained so far; null where every round trains all
    coverage_min="float?",  # the same, of the matrix of which the least was trained
    simulated_seconds="float?",  # how long the server waited, by the devices of the cohort (`fedsim.devices`)
    late="int?",  # of the cohort: those whose update came when the round was over
    dropped_out="int?",  # those who received what was sent and were not heard of again
    excluded="int?",  # those whose device is too small for the method
    metrics="str?",  # JSON: means, by weight, of what clients reported (`ClientUpdate.metrics`); null if nothing
)

CLIENTS = _schema(
    run_id="str",
    algorithm="str",
    seed="int",
    round="int",
    client="int",
    tier="str?",
    num_examples="int",
    num_test_examples="int?",
    accuracy="float?",
    accuracy_local="float?",
    accuracy_val="float?",
    loss="float?",
    train_loss="float?",
    bytes_up="int",
    bytes_down="int",
    train_seconds="float?",
    flops="int?",
    peak_memory_bytes="int?",  # null where it cannot be read
    host="str?",
    node="str?",
    retries="int",
    stage="str",
    model="str?",  # the participant's small form, for example "64x2"
    trainable_params="int?",
    upload_params="int?",
    precision="float?",  # of entities on the global test set, like the two below
    recall="float?",
    f1="float?",
    small_sha256="str?",  # of the small model it trained for itself, in the round it did
    simulated_seconds="float?",  # from the payload to the update, and making its private state where it did
    outcome="str?",  # in_time | late | dropped_out | excluded | failed; null where it was only scored
    metrics="str?",  # JSON: what the method reported of its training (`ClientUpdate.metrics`); null if nothing
)

DEPLOYED = ("run_id", "algorithm", "seed", "round", "client", "tier", "num_examples", "accuracy", "accuracy_local")

PROFILE = _schema(
    run_id="str",
    algorithm="str",
    seed="int",
    round="int",
    place="str",  # driver | aggregator | host N
    broadcast_seconds="float",  # payloads are made, or arrive
    compute_seconds="float",  # participants train and are scored; at the aggregator: its own model is scored
    sum_seconds="float",  # updates are added up
    write_seconds="float",  # states and hashes; at the driver: tables; at a host: what is left of its updates is sent
    idle_seconds="float",  # the rest of the round
)

SCHEMAS: Mapping[str, pa.Schema] = {"runs": RUNS, "rounds": ROUNDS, "clients": CLIENTS}
TABLES = SCHEMAS | {"profile": PROFILE}  # and the one that is written only when it is asked for
