# What a trainer was, for another task to save.

"""
    Snapshot(trainer)

A copy in the host's memory of all that `MXFP4Train.save(trainer, folder)` would write, which another
task saves, with `MXFP4Train.save(snapshot, folder)`, while training goes on, in a Julia of several
threads (`julia -t 2`); where Julia collects garbage in between, it waits for the save. It takes as much
memory as the two tensor files of a checkpoint together, and keeps the model alive.

    snapshot = Snapshot(trainer)
    saving = Threads.@spawn MXFP4Train.save(snapshot, "out")
    step!(trainer, dataset)
    wait(saving)
    renew!(snapshot, trainer)
"""
mutable struct Snapshot <: Handle
    handle::Ptr{Lib.mxt_snapshot}
    uses::Threads.Atomic{Int}

    # Owns `handle` from now on.
    Snapshot(handle::Ptr{Lib.mxt_snapshot}) = finalizer(close, new(handle, new_uses()))
end

function Snapshot(trainer::Trainer)
    return made(Snapshot, Lib.mxt_snapshot, trainer) do handle
        Lib.mxt_trainer_snapshot(trainer, handle)
    end
end

"""
    renew!(snapshot, trainer)

Copies the trainer as it is now in place of what the snapshot held: its memory is used again, which is
faster than new memory. After an error the snapshot may hold nothing.
"""
function renew!(snapshot::Snapshot, trainer::Trainer)
    call(() -> Lib.mxt_snapshot_renew(snapshot, trainer), snapshot, trainer)
    return snapshot
end

"""
    MXFP4Train.save(snapshot, folder)

Saves what the trainer was, as [`MXFP4Train.save`](@ref) of it would have done then.
"""
function save(snapshot::Snapshot, folder::AbstractString)
    text = text_or_nothing("folder", folder)
    return call(() -> Lib.mxt_snapshot_save(snapshot, text), snapshot)
end

release(handle::Ptr{Lib.mxt_snapshot}) = Lib.mxt_snapshot_free(handle)
Base.unsafe_convert(::Type{Ptr{Lib.mxt_snapshot}}, snapshot::Snapshot) = snapshot.handle

Base.show(io::IO, snapshot::Snapshot) =
    print(io, "Snapshot(", isopen(snapshot) ? "" : "closed", ")")
