"""The training loop. :func:`do_train` contains everything that happens in a step, in order."""

from __future__ import annotations

import logging
import time
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

from omegaconf import OmegaConf

from dinov2_custom import distributed, entry
from dinov2_custom.cli import train_parser as get_args_parser
from dinov2_custom.configs.load import find_config, with_defaults
from dinov2_custom.configs.paths import check_output_dir
from dinov2_custom.data.loaders import make_dataset, make_train_loader
from dinov2_custom.errors import COLLAPSED, DONE, CheckpointError, stopped_by
from dinov2_custom.logging import (
    METRICS_FILE,
    WINDOW,
    MetricLogger,
    SmoothedValue,
    open_log,
    open_sinks,
    read_rows,
    setup_logging,
    truncate_after,
)
from dinov2_custom.parallel import parallelize
from dinov2_custom.reading import choose_for_training
from dinov2_custom.train.checkpoint import Checkpointer, has_checkpoints, save_teacher, set_aside
from dinov2_custom.train.course import Course, run_length
from dinov2_custom.train.fast_paths import choose_attention
from dinov2_custom.train.faults import Watchdog, reported
from dinov2_custom.train.flops import speed_report
from dinov2_custom.train.health import BAD_IMAGES_FILE, BadImageLog, LearningAlarm, flat_dino_loss, rankme
from dinov2_custom.train.memory import split_over_memory
from dinov2_custom.train.online import OnlineEvaluation
from dinov2_custom.train.optimization import (
    accumulate_gradients,
    apply_optim_scheduler,
    build_optimizer,
    build_schedulers,
    clip_gradients,
    step_unless,
    weight_norm,
)
from dinov2_custom.train.pretrained import start_from_weights
from dinov2_custom.train.run_directory import changed_batch, changed_data, changed_keys, is_refusal, made_and_locked
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.train.startup import describe_end, describe_run, short_run_warning
from dinov2_custom.train.step_guard import Flags, StepGuard
from dinov2_custom.train.stopping import StopRequests
from dinov2_custom.utils.allocator import keep_freed_memory
from dinov2_custom.utils.config import get_cfg_from_args, load_cfg_from_args, write_config
from dinov2_custom.utils.rng import generator_for
from dinov2_custom.utils.run_folder import BEST

logger = logging.getLogger("dinov2")
MIN_COLLECTIVE_S = 1800.0  # all processes must also start within this time


def do_test(cfg, model: SSLMetaArch, iteration: int | str) -> Path:
    """Write the teacher's weights to ``eval/<iteration>/teacher_checkpoint.pth`` and return the path."""
    return save_teacher(model, Path(cfg.train.output_dir), str(iteration))


def do_train(cfg, model: SSLMetaArch, resume: bool = False, *, loader=None) -> int:
    """Train ``model`` and return the exit code, as defined in ``errors``.

    Args:
        resume: continue from the newest checkpoint in the run directory, if there is one.
        loader: returned by :func:`make_train_loader`; None: made as ``cfg`` describes.

    Raises:
        NumericsError: the loss or a gradient was non-finite in ``train.max_nonfinite_steps`` consecutive steps.
        DataError: more images than ``train.max_bad_fraction`` cannot be read.
        CheckpointError: the run directory holds a checkpoint of another architecture.
    """
    cfg = with_defaults(cfg)
    out, rank, world_size = Path(cfg.train.output_dir), distributed.get_global_rank(), distributed.get_global_size()
    if loader is None:
        cfg, loader = open_data(cfg, resume)
    online = OnlineEvaluation(cfg, loader)
    length = run_length(cfg, loader.num_images, world_size)
    schedules = build_schedulers(cfg, length)
    resume = resume and has_checkpoints(out)
    if not resume:
        start_from_weights(cfg, model)
        if rank == 0:  # left by a failed start; its images may have been repaired since
            (out / BAD_IMAGES_FILE).unlink(missing_ok=True)
    reducer = parallelize(cfg, model)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    keep = {name: cfg.checkpointing[name] for name in ("keep_last", "keep_every", "on_error", "async_save")}
    checkpointer = Checkpointer(out, model, optimizer, model.fp16_scaler, **keep)
    resumed = checkpointer.load_latest() if resume else None
    open_log("dinov2")  # the last user-fixable error is above this line
    iteration = 0 if resumed is None else resumed.iteration + 1
    kept = {} if resumed is None else resumed.values
    course = Course(length, kept.get("course"), late=int(distributed.is_enabled()))
    if course.is_finished(iteration):
        logger.info(f"nothing to do: {course.how_to_extend()}")
        return DONE
    changes = [] if resumed is None else changed_batch(kept, cfg, world_size) + changed_keys(kept, cfg)
    changes += changed_data(kept.get("data"), loader.found)
    if changes:
        logger.warning(f"resumed with other settings than before: {'; '.join(changes)}")
    write_config(cfg, str(out))
    kernel = choose_attention(model)
    for line in (*describe_run(cfg, model, course, loader.num_images, world_size), reducer.describe(), kernel):
        if line:
            logger.info(line)
    if doubts := short_run_warning(cfg, course, loader.num_images):
        logger.warning(doubts)
    if rank == 0:
        truncate_after(out / METRICS_FILE, iteration - kept.get("has_row_of_stop", 0))
    sinks = open_sinks(out, OmegaConf.to_container(cfg), iteration, kept.get("wandb_run_id"), kept.get("mlflow_run_id"))
    seldom = partial(SmoothedValue, max(1, WINDOW // cfg.train.log_every))  # of what is computed for rows only
    make = dict.fromkeys(("teacher_entropy", "prototype_entropy", "weight_norm_backbone"), seldom)
    make["rankme"] = partial(seldom, of=rankme)
    metrics = MetricLogger(delimiter="  ", sinks=sinks, make=make)
    metrics.load_state(kept.get("windows", {}))
    trained_start = bool(cfg.student.pretrained_weights or cfg.MODEL.WEIGHTS)
    flat_loss = flat_dino_loss(model)
    alarm = LearningAlarm(
        model.num_prototypes, flat_loss, course.expected_total, sinks.summarize, trained_start, name_recipe=bool(doubts)
    )
    earlier = read_rows(out / METRICS_FILE) if rank == 0 else []
    alarm.read(earlier)
    sinks.add(alarm)
    online.begin(earlier, resumed is not None)
    save_period = cfg.checkpointing.period or 3 * length.epoch_length
    frozen = length.iterations(cfg.student.freeze_backbone_epochs)
    eval_period = cfg.evaluation.eval_period_iterations
    guard = StepGuard(cfg.train.max_nonfinite_steps, model.fp16_scaler is not None, checkpointer.newest)
    guard.skipped = kept.get("skipped_steps", 0)
    stops = cfg.train.on_collapse == "stop"
    model.train()

    watching = Watchdog(out, cfg.train.hang_timeout)
    with StopRequests() as stop, sinks, reported(cfg, out), watching as watch, closing(checkpointer), closing(online):
        first_draw = resumed.draws if resumed and resumed.draws is not None else iteration * length.global_batch
        batches = loader.batches(device=model.device, first_draw=first_draw)
        for batch in metrics.log_every(
            batches,
            cfg.train.log_every,
            "Training",
            None if course.limit_s else length.total,
            iteration,
            images_per_iteration=length.global_batch,
            speeds=speed_report(cfg, model, world_size),
            left_s=course.left_s,
            limit_s=course.limit_s,
            shown=("total_loss", "lr", "grad_norm_backbone", "teacher_entropy", "prototype_entropy"),
        ):
            watch.mark(iteration)
            position, last = course.position(iteration), course.is_last(iteration)
            lr, wd, momentum, teacher_temp, last_layer_lr = (float(schedule[position]) for schedule in schedules)
            apply_optim_scheduler(optimizer, lr, wd, last_layer_lr, frozen_backbone=position < frozen)

            if online.start_is_due:  # not earlier: data-loading processes must start before the first collective
                online.evaluate_start(model, teacher_temp)
            evaluates = online.is_due(iteration, last)

            # gradients
            optimizer.zero_grad(set_to_none=True)
            model.diagnose = iteration % cfg.train.log_every == 0 or last or evaluates
            drop_path_draws = generator_for(cfg.train.seed, "drop_path", iteration, rank)
            losses = accumulate_gradients(cfg, model, reducer, batch, batches, teacher_temp, drop_path_draws)

            # update, unless something is not finite
            grad_norms = clip_gradients(cfg, model, optimizer)
            own = Flags(stop.signum, course.read_clock(), stops and alarm.has_collapsed)
            losses, skip = guard.check(iteration, losses, grad_norms, own)
            step_unless(skip, model, optimizer, momentum)
            flags = guard.poll()
            course.update(flags.seconds)

            # report
            metrics.update(
                lr=lr,
                wd=wd,
                mom=momentum,
                last_layer_lr=last_layer_lr,
                current_batch_size=float(cfg.train.batch_size_per_gpu),
                total_loss=sum(losses.values()),
                **losses,
                **grad_norms,
            )
            if model.diagnose:
                metrics.update(**model.diagnostics, weight_norm_backbone=weight_norm(model.student["backbone"]))
            if evaluates:
                watch.mark(iteration, patience=3)
                row = online.evaluate(model, iteration, teacher_temp, lambda: metrics.total_loss.median)
                metrics.add_to_row(**row)

            if last or flags.end:
                guard.drain()
                reducer.check()
                metrics.end_after_this()
            metrics.counts["skipped_steps"] = guard.skipped
            metrics.counts["epoch"] = round((iteration + 1) * length.global_batch / loader.num_images, 6)
            metrics.write_now()  # otherwise a kill after the save would leave a gap in the metrics

            # save
            watch.mark(iteration, patience=3)
            if last or (eval_period > 0 and (iteration + 1) % eval_period == 0):
                teacher_path = checkpointer.save_teacher(f"training_{iteration}", final=last)
            if evaluates and online.is_best:
                checkpointer.save_teacher(BEST, facts=online.facts)
            if last or flags.end or (iteration + 1) % save_period == 0:
                leaving = flags.end
                extra = sinks.state() | course.state(ended=last) | {"windows": metrics.state()} | guard.state()
                extra["data"] = loader.found
                # a run without the stop does not have the row that the stop writes
                extra["has_row_of_stop"] = int(leaving and not last and not model.diagnose)
                checkpoint_path = checkpointer.save(
                    iteration, final=last, wait=leaving, draws=loader.draws, extra=extra
                )
            watch.mark(iteration)
            iteration += 1
        verdicts = alarm.final_verdicts()
        sinks.summarize({"verdict": ", ".join(verdicts) or "none"})
        if not last:
            code = stopped_by(flags.stop_signal) if flags.stop_signal else COLLAPSED
            sinks.close(code)
            for warning in verdicts.values():
                logger.warning(warning)
            why = "" if flags.stop_signal else " because the run has collapsed (train.on_collapse=stop)"
            logger.warning(
                f"stopped after iteration={iteration - 1}{why}; the same command resumes from {checkpoint_path}"
            )
            distributed.barrier()  # a launcher ends the other processes when the first one exits
            return code

    for line in describe_end(cfg, teacher_path, checkpoint_path, verdicts):
        logger.info(line)
    for warning in verdicts.values():
        logger.warning(warning)
    return DONE


def open_data(cfg, resume: bool, on_bad_image=None):
    """Return (``cfg`` with ``data.intensity`` as chosen, the loader of :func:`make_train_loader`)."""
    dataset = make_dataset(dataset_str=cfg.train.dataset_path)
    out = Path(cfg.train.output_dir)
    cfg = choose_for_training(cfg, dataset, out if resume and has_checkpoints(out) else None)
    place = {"rank": distributed.get_global_rank(), "world_size": distributed.get_global_size()}
    cores = distributed.share_of_cores()
    loader = make_train_loader(cfg, **place, cores=cores, dataset=dataset, on_bad_image=on_bad_image)
    loader.found |= {"images": len(dataset), "digest": getattr(dataset, "digest", str)()}
    return cfg, loader


def main(args) -> int:
    """Run one training or, with ``--eval-only``, write the newest checkpoint's teacher; return the exit code.

    Args:
        args: parsed by :func:`get_args_parser`.

    Raises:
        DINOv2Error: bad configuration, data or checkpoint; raised before any work is done where possible.
    """
    hang_s = load_cfg_from_args(args, warn=lambda text: None).train.hang_timeout
    # hangs are left to the watchdog, which writes stacks; the collectives' timeout must exceed the watchdog's
    with distributed.enabled(overwrite=True, timeout_s=max(4 * hang_s, MIN_COLLECTIVE_S) if hang_s else 0):
        return _run(args, distributed.get_global_rank())


def _run(args, rank: int) -> int:
    notes: list[str] = []
    cfg = get_cfg_from_args(args, warn=notes.append)
    split_over_memory(SSLMetaArch, cfg)
    OmegaConf.set_readonly(cfg, True)
    check_output_dir(cfg.train.output_dir)
    setup_logging(output=cfg.train.output_dir, name="dinov2", level=logging.INFO, hold=True)
    if args.config_file:
        logger.info(f"config: {find_config(args.config_file).absolute()}")
    bad_images = BadImageLog(Path(cfg.train.output_dir) / BAD_IMAGES_FILE)
    cfg, loader = open_data(cfg, not args.no_resume, on_bad_image=bad_images)

    out = Path(cfg.train.output_dir)
    try:
        with made_and_locked(out) if rank == 0 else nullcontext(), reported(cfg, out):
            if args.no_resume and rank == 0 and (aside := set_aside(out, lambda: time.strftime("%Y%m%d-%H%M%S"))):
                notes.append(f"--no-resume: the former run's files are now in {aside}")
            for note in notes:
                logger.warning(note)
            if (out / "logs").exists():
                open_log("dinov2")
            return _train_or_write(args, cfg, loader)
    except Exception as e:
        if not is_refusal(e):  # otherwise nothing is left behind
            open_log("dinov2")
        raise


def _train_or_write(args, cfg, loader) -> int:
    if (device := distributed.get_device()).type == "cpu":
        keep_freed_memory()
    model = SSLMetaArch(cfg).to(device)
    model.prepare_for_distributed_training(load_weights=False)  # do_train loads them, unless it resumes
    if args.eval_only:
        return write_newest_teacher(cfg, model)
    return do_train(cfg, model, resume=not args.no_resume, loader=loader)


def write_newest_teacher(cfg, model: SSLMetaArch) -> int:
    """Write the newest checkpoint's teacher under upstream's name, ``manual_<next iteration>``."""
    optimizer = build_optimizer(cfg, model.get_params_groups())
    out = Path(cfg.train.output_dir)
    done = Checkpointer(out, model, optimizer).load_latest() if has_checkpoints(out) else None
    if done is None:
        raise CheckpointError(f"--eval-only: expected a run with a checkpoint, got none in {out}; check --output-dir")
    open_log("dinov2")
    logger.info(f"teacher weights: {do_test(cfg, model, f'manual_{done.iteration + 1}')}")
    return 0


if __name__ == "__main__":
    entry.leave(entry.run("dinov2_custom.train.train", get_args_parser().parse_args(), quiet_threads=True))
