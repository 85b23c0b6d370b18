"""Plans a run on TPUs or GPUs before they are rented: the memory that it needs, and a bound on its speed."""
