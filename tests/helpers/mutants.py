"""Code changes that each break one clause of a promise, and the test that fails on each.

    python tests/helpers/mutants.py     prints the table of docs/design.md

test_mutants.py applies each mutant. If a mutant's `old` text is no longer in its file, adapt the
mutant so that it breaks the same clause again.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A change to one file, and a test that fails after it."""

    clause: str  # starts with the promise, as in "P1: "
    change: str  # what the mutant does wrong
    file: str
    old: str  # occurs exactly once in the file
    new: str
    test: str  # node id relative to tests/; the cheapest test that fails


# ruff: noqa: E501 (code and node ids are not wrapped)
MUTANTS = (
    # P1: exact metrics
    Mutant(
        "P1: every sample is counted exactly once, for any batch size and remainder",
        "evaluation pads the last batch",
        "lab/data/sampler.py",
        "samples = range(start, min(start + self.batch_size, self.num_samples))",
        "samples = range(start, start + self.batch_size)",
        "unit/test_loaders.py::test_p1_evaluation_deals_out_whole_batches_and_counts_each_sample_once[99-10-2]",
    ),
    Mutant(
        "P1: a missing or repeated sample raises at run time",
        "`predict_all` does not check that every sample was seen once",
        "lab/engine/evaluation.py",
        "if not bool((counts == 1).all()):",
        "if False:",
        "unit/test_evaluation.py::test_p1_a_missing_or_repeated_sample_raises",
    ),
    Mutant(
        "P1: a missing or repeated sample raises at run time",
        "the check is an `assert`, which Python's option -O removes",
        "lab/engine/evaluation.py",
        "    if not bool((counts == 1).all()):",
        "    assert bool((counts == 1).all())\n    if False:",
        "unit/test_evaluation.py::test_p1_a_missing_or_repeated_sample_raises",
    ),
    Mutant(
        "P1: metrics are the same for any number of processes",
        "each process evaluates with its own BatchNorm statistics",
        "lab/engine/evaluation.py",
        "if accelerator.num_processes > 1:",
        "if False:",
        "unit/test_evaluation.py::test_p1_every_process_evaluates_with_the_buffers_of_rank_0",
    ),
    Mutant(
        "P1: the confusion matrix sums to the number of samples, checked at run time",
        "the sum is not checked",
        "lab/engine/metrics.py",
        "if not int(matrix.sum()) == len(labels) == len(predictions):",
        "if False:",
        "unit/test_metrics.py::test_p1_labels_and_predictions_of_different_samples_raise",
    ),
    Mutant(
        "P1: each sample is counted in its own cell",
        "a class that is out of range is counted in the cell of another class",
        "lab/engine/metrics.py",
        "if len(classes) and not 0 <=",
        "if False and not 0 <=",
        "unit/test_metrics.py::test_p1_an_unknown_class_raises[confusion_matrix-0-3]",
    ),
    Mutant(
        "P1: macro-F1 equals scikit-learn's",
        "the mean includes classes that neither occur nor are predicted",
        "lab/engine/metrics.py",
        '["f1"][present].mean()',
        '["f1"].mean()',
        "unit/test_metrics.py::test_p1_report_equals_scikit_learn[neither]",
    ),
    Mutant(
        "P1: accuracy equals scikit-learn's",
        "accuracy is the mean of the recalls of the classes",
        "lab/engine/metrics.py",
        "(labels == predictions).sum().item() / len(labels)",
        'per_class(labels, predictions, num_classes)["recall"].mean().item()',
        "unit/test_metrics.py::test_p1_report_equals_scikit_learn[absent class]",
    ),
    # P2: one loss curve
    Mutant(
        "P2: `--batch-size` is the global batch",
        "every process trains on the whole batch",
        "lab/data/sampler.py",
        "parts = tuple(p[shard(len(p), self.rank, self.world_size)] for p in whole_parts)",
        "parts = tuple(whole_parts)",
        "unit/test_loaders.py::test_p2_batches_are_the_same_for_any_world[99-10-2]",
    ),
    Mutant(
        "P2: the order of the samples depends only on (seed, epoch)",
        "the order depends on the process",
        "lab/data/sampler.py",
        "permutation(self.num_samples, self.seed, epoch)",
        "permutation(self.num_samples, self.seed + self.rank, epoch)",
        "unit/test_loaders.py::test_p2_batches_are_the_same_for_any_world[99-10-3]",
    ),
    Mutant(
        "P2: augmentation depends only on (seed, epoch, sample)",
        "augmentation depends on the position in the epoch",
        "lab/data/sampler.py",
        "return bits if self.balanced_sampling else bits[order]",
        "return bits",
        "unit/test_loaders.py::test_p2_the_random_bits_of_a_sample_are_its_own",
    ),
    Mutant(
        "P2: the loss curve is the same for any number of processes",
        "gradients are divided by the number of processes",
        "lab/engine/training.py",
        "scale = accelerator.num_processes / batch.global_batch_size",
        "scale = 1 / batch.global_batch_size",
        "unit/test_engine.py::test_p2_the_mean_of_the_processes_steps_is_the_step_of_one_process",
    ),
    Mutant(
        "P2: losses are weighted by the true number of samples",
        "each process weights its mean loss equally",
        "lab/engine/training.py",
        "scale = accelerator.num_processes / batch.global_batch_size",
        "scale = 1 / max(1, len(batch.labels))",
        "unit/test_engine.py::test_p2_a_part_of_a_batch_is_weighted_by_its_number_of_samples",
    ),
    Mutant(
        "P2: losses are weighted by the true number of samples",
        "the mean loss of an epoch counts the last batch as a full batch",
        "lab/engine/training.py",
        "num_samples += batch.global_batch_size",
        "num_samples += sampler.batch_size",
        "unit/test_engine.py::test_an_epoch_reports_its_steps_and_means_over_samples",
    ),
    Mutant(
        "P2: dropout is seeded by (seed, step, process)",
        "dropout is not seeded per process",
        "lab/engine/training.py",
        "seed_dropout(derive_seed(config.seed, state.step, accelerator.process_index), device)",
        "seed_dropout(derive_seed(config.seed, state.step), device)",
        "unit/test_engine.py::test_p2_dropout_differs_between_processes",
    ),
    Mutant(
        "P2: all processes read the same data",
        "fingerprints are not compared across processes",
        "lab/distributed.py",
        "ranks = [str(rank) for rank, values in enumerate(gathered) if values != gathered[0]]",
        "ranks: list[str] = []",
        "unit/test_fingerprint.py::test_processes_that_differ_are_named",
    ),
    Mutant(
        "P2: gradient checkpointing changes no loss",
        "BatchNorm statistics are updated again when activations are recomputed",
        "lab/engine/grad_checkpointing.py",
        "setattr(layer, name, buffer.clone())",
        "setattr(layer, name, buffer)",
        "unit/test_grad_checkpointing.py::test_p2_the_same_steps_with_less_memory[efficientnet_b0]",
    ),
    # P3: nothing lost
    Mutant(
        "P3: a file is replaced atomically",
        "files are written in place",
        "lab/checkpoint/atomic_io.py",
        "            sync(temporary)\n            os.replace(temporary, path)\n",
        "            path.write_bytes(temporary.read_bytes())\n            sync(path)\n",
        "faults/test_faults.py::test_p3_best_weights_are_the_old_or_the_new[killed]",
    ),
    Mutant(
        "P3: a power loss leaves the old file or the new one",
        "a file is renamed before its content is on the disk",
        "lab/checkpoint/atomic_io.py",
        "            sync(temporary)\n",
        "",
        "unit/test_checkpoint.py::test_p3_content_is_on_disk_before_it_takes_the_name",
    ),
    Mutant(
        "P3: a run resumes from its last complete checkpoint",
        "the checksum of the tensors is not checked",
        "lab/checkpoint/train_state.py",
        'if _sha256(tensors) != metadata["tensors_sha256"]:',
        "if False:",
        "faults/test_damage.py::test_p3_damage_to_a_checkpoint_is_noticed[tensors.safetensors-flipped]",
    ),
    Mutant(
        "P3: a resumed run ends with bit-identical weights",
        "the optimizer state is not restored",
        "lab/checkpoint/manager.py",
        "train_step.optimizer.state[parameter][slot] = tensor.detach()",
        "pass",
        "faults/test_resume.py::test_p3_a_resumed_run_ends_with_the_same_bits[nesterov]",
    ),
    Mutant(
        "P3: a resumed run ends with bit-identical weights",
        "dropout is not seeded by the step",
        "lab/engine/training.py",
        "seed_dropout(derive_seed(config.seed, state.step, accelerator.process_index), device)",
        "pass",
        "unit/test_engine.py::test_p2_dropout_depends_on_the_step_and_the_seed_only",
    ),
    Mutant(
        "P3: a resumed run sees the same samples in the same order",
        "it restarts the epoch",
        "lab/engine/training.py",
        "loader.batches(state.epoch, state.batch)",
        "loader.batches(state.epoch)",
        "unit/test_engine.py::test_an_epoch_can_be_stopped_and_continued",
    ),
    Mutant(
        "P3: SIGTERM and Ctrl-C save a checkpoint first",
        "no checkpoint is saved after a signal",
        "lab/checkpoint/manager.py",
        "if self.stop_reason or (every and state.step % every == 0):",
        "if every and state.step % every == 0:",
        "distributed/test_stopping.py::test_p3_a_signal_in_a_step_saves_before_the_run_ends",
    ),
    Mutant(
        "P3: a signal stops all processes at the same step",
        "a process ignores the signals of the others",
        "lab/checkpoint/interrupt.py",
        "return StopReason(reason) if reason else None",
        "return own",
        "distributed/test_stopping.py::test_p3_a_signal_to_one_process_stops_all_at_the_same_step",
    ),
    Mutant(
        "P3: a full disk loses no complete checkpoint",
        "a full disk ends the run",
        "lab/checkpoint/manager.py",
        'except (UserError, OSError) as error:\n            console.warn(f"{path} is not',
        'except ZeroDivisionError as error:\n            console.warn(f"{path} is not',
        "faults/test_faults.py::test_p3_a_disk_that_is_full_at_any_write_loses_only_that_checkpoint[False]",
    ),
    # P4: no pickle
    Mutant(
        "P4: loading a file from a stranger cannot run code",
        "a checkpoint is read with `torch.load`",
        "lab/checkpoint/train_state.py",
        "safetensors.torch.load(tensors)",
        'getattr(torch, "load")(__import__("io").BytesIO(tensors), weights_only=False)',
        "faults/test_damage.py::test_p4_a_pickle_is_never_read",
    ),
    Mutant(
        "P4: code that a weights file names is not imported",
        "it is imported without `--dataset`",
        "lab/data/own_dataset.py",
        "if not named:",
        "if False:",
        "unit/test_own_dataset.py::test_p4_only_the_command_line_makes_a_file_be_imported",
    ),
    Mutant(
        "P4: weights are written as safetensors",
        "weights are written with `torch.save`",
        "lab/checkpoint/weights.py",
        "write_atomically(path, safetensors.torch.save(tensors, header))",
        "torch.save(tensors, path)",
        "unit/test_architecture.py::test_p4_no_pickle",
    ),
    Mutant(
        "P4: CIFAR's archive is read only after its MD5 is checked",
        "the MD5 is not checked",
        "lab/data/torchvision_datasets.py",
        "return getattr(datasets, name)(data_dir, train=train)",
        "setattr(getattr(datasets, name), '_check_integrity', lambda self: True); return getattr(datasets, name)(data_dir, train=train)",
        "unit/test_sources.py::test_p4_a_cifar_archive_of_another_md5_is_not_unpickled",
    ),
    # P5: self-describing weights
    Mutant(
        "P5: the weights file contains everything needed to use it",
        "the metadata lacks the normalization",
        "lab/checkpoint/weights.py",
        '        "std": splits.std,\n',
        "",
        "unit/test_checkpoint.py::test_p5_metadata_holds_all_that_is_needed",
    ),
    Mutant(
        "P5: parameter names are those of the plain model",
        "the names of a compiled model have a prefix",
        "lab/engine/training.py",
        "model.compile()",
        "model = torch.compile(model)",
        "unit/test_checkpoint.py::test_p5_no_wrapper_leaks_into_the_keys[lenet5-settings1]",
    ),
    # P6: honest model selection
    Mutant(
        "P6: the validation split is held out from the training data",
        "validation samples are trained on",
        "lab/data/splits.py",
        "train, val = stratified_split(",
        "_, val = stratified_split(",
        "unit/test_sources.py::test_p6_validation_is_cut_from_training_and_test_is_apart",
    ),
    Mutant(
        "P6: the best epoch is selected on the validation split",
        "the best epoch is selected on the test split",
        "lab/data/splits.py",
        'val = sized.get("val", sized["test"])',
        'val = sized["test"]',
        "unit/test_sources.py::test_p6_validation_is_cut_from_training_and_test_is_apart",
    ),
    Mutant(
        "P6: the weights of the best epoch are tested",
        "the weights of the last epoch are tested",
        "train.py",
        "temperature = best_weights.load(accelerator, train_step.eval_model)\n",
        "temperature = 1.0\n",
        "unit/test_train.py::test_p6_the_epoch_kept_is_the_best_by_the_number_chosen[macro_f1-1]",
    ),
    Mutant(
        "P6: the test split is read once, at the end",
        "the test split is evaluated after every epoch",
        "train.py",
        "            checkpoints.save(best, state)\n",
        "            checkpoints.save(best, state)\n            predict_all(accelerator, train_step.eval_model, test_loader)\n",
        "unit/test_train.py::test_p6_the_test_split_is_read_once_at_the_end",
    ),
    Mutant(
        "P6: the `notebook` recipe's reports say so",
        "report.json claims a validation split",
        "lab/report/results.py",
        '"selection_split": splits.selection_split,',
        '"selection_split": "validation",',
        "unit/test_train.py::test_p6_the_notebook_recipe_says_that_it_chose_on_the_test_split",
    ),
    # P7: clear errors
    Mutant(
        "P7: a user's mistake ends with exit code 2",
        "the exit code is 1",
        "lab/errors.py",
        "code = 2 if mistake else 1",
        "code = 1",
        "unit/test_errors.py::test_p7_asking_for_too_much_memory_is_a_users_mistake",
    ),
    Mutant(
        "P7: a user's mistake shows no traceback",
        "the traceback is printed",
        "lab/errors.py",
        'if mistake is None or "--debug" in sys.argv:',
        "if True:",
        "unit/test_errors.py::test_p7_asking_for_too_much_memory_is_a_users_mistake",
    ),
    Mutant(
        "P7: an error is one line",
        "a message with line breaks is printed as it is",
        "lab/console.py",
        'text = " ".join(line.strip() for line in text.splitlines() if line.strip())',
        "pass",
        "unit/test_console.py::test_p7_an_error_is_one_line",
    ),
    Mutant(
        "P7: an error is printed on standard error",
        "it is printed on standard output",
        "lab/console.py",
        "file=sys.stderr, flush=True)",
        "flush=True)",
        "unit/test_console.py::test_p7_an_error_is_one_line",
    ),
    Mutant(
        "P7: an error is printed by one process",
        "every process prints a `UserError`",
        "lab/distributed.py",
        "console.configure(main_process=world.is_main_process,",
        "console.configure(main_process=True,",
        "unit/test_errors.py::test_p7_the_main_process_alone_prints_an_error[False]",
    ),
    Mutant(
        "P7: a mistake in one process is raised in all",
        "the other processes continue",
        "lab/distributed.py",
        "if mistake is None and first:",
        "if False:",
        "unit/test_errors.py::test_p7_a_mistake_of_one_process_is_raised_on_all",
    ),
    Mutant(
        "P7: nothing is left half-written",
        "a run that cannot start leaves its directory behind",
        "lab/checkpoint/run_dir.py",
        "            if self._created_directories:\n",
        "            if False:\n",
        "unit/test_errors.py::test_p7_a_run_that_cannot_be_begun_leaves_no_folder",
    ),
)


def rows() -> list[str]:
    """Return the lines of the table in docs/design.md."""
    lines = ["| Clause | Change that breaks it | Test that fails |", "| --- | --- | --- |"]
    for mutant in MUTANTS:
        test = mutant.test.split("[")[0]
        lines.append(f"| {mutant.clause} | {mutant.change} | `{test}` |")
    return lines


if __name__ == "__main__":
    print("\n".join(rows()))
